"""Drafting with a language model: a separate draft model, or the target's first layers."""

from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.model.early_exit import early_exit

__all__ = ["ModelDrafter", "early_exit"]
