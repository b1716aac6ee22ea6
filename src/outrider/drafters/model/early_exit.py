"""Early exit: the target's own first layers draft, with its final norm and head; no additional weights.

The first layers run as a separate model with its own KV cache (K / L of the target's size), so they support everything a draft
model does (chains, trees, coupled draws). Drafting with a part of the target goes back to Elhoushi et al. 2024 (LayerSkip,
arXiv 2404.16710), whose targets are trained for it; with other targets, earlier exits give worse drafts.
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
    return ModelDrafter(
        first_layers(target, layers), growth.depth, growth=growth, vocab_size=target.vocab_size, name=f"early:{layers}"
    )


def first_layers(target: Target, layers: int) -> Target:
    """Those layers of a target. Raises CapabilityError for one that cannot run in part."""
    if not isinstance(target, OpenTarget):
        raise CapabilityError(
            f"a {type(target).__name__} cannot run its first layers alone: use a separate draft model, or 'ngram'"
        )
    return target.first_layers(layers)
