"""Early exit: the target's own first layers propose, with its final norm and head; no weight of their own.

The first layers run as a model of their own with keys and values of their own (K / L of the target's), so everything a draft
model can do (chains, trees, coupled draws) they can do too. Drafting with a part of the target goes back to Elhoushi et al.
2024 (LayerSkip, arXiv 2404.16710), whose targets are trained for it; other targets draft the worse the earlier they exit.
"""

from __future__ import annotations

from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.tree.growth import Growth
from outrider.errors import CapabilityError
from outrider.protocols import OpenTarget, Target


def early_exit(target: Target, layers: int, growth: Growth) -> ModelDrafter:
    """A drafter of the first `layers` of `target` (1 .. all), growing its drafts as `growth` says.

    Raises CapabilityError for a target that cannot run in part.
    """
    if not isinstance(target, OpenTarget):
        raise CapabilityError(
            f"a {type(target).__name__} cannot run its first layers alone: use a draft model of its own, or 'ngram'"
        )
    return ModelDrafter(
        target.first_layers(layers), growth.depth, growth=growth, vocab_size=target.vocab_size, name=f"early:{layers}"
    )
