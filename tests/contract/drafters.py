"""The table of drafters: every row goes through the whole contract suite. A new drafter is a new row."""

from __future__ import annotations

from collections.abc import Callable

from outrider.drafters.combine import first_of
from outrider.drafters.model import ModelDrafter
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.drafters.prediction import Prediction
from outrider.drafters.shapes import Shared, best_tree
from outrider.protocols import Drafter
from outrider.target.toy import TableTarget, TinyLM

Toy = TinyLM | TableTarget
Factory = Callable[[Toy, int], Drafter]
"""(the target, how many slots the engine will have) -> an unbound drafter; the engine binds it."""


def small(target: Toy) -> Toy:
    """A draft model that agrees with the target often and not always."""
    return target.perturbed(0.3, seed=7)


def other_vocabulary(target: Toy, more: int) -> TinyLM:
    """A draft model with `more` tokens than the target (fewer if negative): padding of its embedding table."""
    return TinyLM(target.vocab_size + more, 16, 1, seed=11, sharp=2.0)


DRAFTERS: dict[str, Factory] = {
    "none": lambda target, slots: NoDraft(),
    "ngram": lambda target, slots: NGram(5, max_n=3, min_n=1),
    "model": lambda target, slots: ModelDrafter(small(target), 4),
    "model-coupled": lambda target, slots: ModelDrafter(small(target), 4, sample="coupled"),
    "model-short-context": lambda target, slots: ModelDrafter(small(target), 4, max_length=14),
    "model-padded": lambda target, slots: ModelDrafter(
        other_vocabulary(target, 3), 3, sample="greedy", vocab_size=target.vocab_size
    ),
    "tree-iid": lambda target, slots: ModelDrafter(small(target), 3, branching=(2, 2, 1)),
    "tree-coupled": lambda target, slots: ModelDrafter(small(target), 3, branching=(2, 1, 2), sample="coupled"),
    "batch": lambda target, slots: ModelDrafter(small(target), 3, branching=(3, 1, 1)),
    "shared": lambda target, slots: ModelDrafter(small(target), 3, shape=Shared(3, 3)),
    "shared-coupled": lambda target, slots: ModelDrafter(small(target), 3, shape=Shared(2, 3), sample="coupled"),
    "best-tree": lambda target, slots: ModelDrafter(
        small(target), 3, shape=best_tree((0.5, 0.2, 0.1), 7, 3), siblings="without_replacement"
    ),
    "ngram+tree": lambda target, slots: first_of(
        NGram(4), Prediction(3), ModelDrafter(small(target), 2, branching=(3, 2), siblings="without_replacement")
    ),
}
