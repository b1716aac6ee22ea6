"""A language model proposes: a draft model of its own, or the target's first layers."""

from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.model.early_exit import early_exit

__all__ = ["ModelDrafter", "early_exit"]
