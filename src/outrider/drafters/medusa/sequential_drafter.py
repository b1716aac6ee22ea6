"""Serving sequential heads: the first level from hidden states and the anchor, a forward for each further one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.last_state import LastRowDrafter
from outrider.drafters.medusa.sequential import SequentialNetwork
from outrider.drafters.medusa.sequential_forward import Forward, NativeForward, forward_of
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import Growth, NextLogits
from outrider.nn.ahead import Ahead
from outrider.types import Evidence


class SequentialDrafter(LastRowDrafter):
    """Drafts with `SequentialNetwork`. growth: how trees grow, of any depth. forward: makes the network's forward."""

    def __init__(
        self,
        heads: SequentialNetwork,
        growth: Growth,
        *,
        name: str = "medusa",
        forward: Callable[[SequentialNetwork], Forward] = forward_of,
    ) -> None:
        super().__init__(taps=heads.config.taps, growth=growth, name=name)
        self._run = forward(heads)

    def begin(
        self,
        evidence: Evidence,
        live: Sequence[int],
        states: Float[Tensor, "K n H"],
        depths: Sequence[int],
        forest: Forest,
    ) -> tuple[Float[Tensor, "n V"], NextLogits]:
        """The level behind the anchors."""
        state, logits = self._run.forward([evidence.sequences[i].tokens[-1] for i in live], taps=states)
        return logits, Follower(self._run, live, state, forest)


class Follower:
    """Feeds draft nodes: each reads its token and the state of the node above. state: of the anchors of the sequences `live`."""

    def __init__(self, run: Forward, live: Sequence[int], state: Float[Tensor, "n D"], forest: Forest) -> None:
        self._run, self._anchors, self._forest = run, state, forest
        self._states = {(i, -1): own for i, own in zip(live, state, strict=True)}

    def __call__(self, frontier: list[tuple[int, int]]) -> Float[Tensor, "n V"]:
        forest = self._forest
        above = torch.stack([self._states[i, forest.parent[i][k]] for i, k in frontier])
        state, logits = self._run.forward([forest.tokens[i][k] for i, k in frontier], state=above)
        self._states |= zip(frontier, state, strict=True)
        return logits

    def levels(self) -> Float[Tensor, "levels n V"] | None:
        """Every level takes a forward."""

    def ahead(self, live: list[int], depth: list[int], logits: Float[Tensor, "r V"]) -> Ahead | None:
        """See `tree.chain.Foreseeing`."""
        return self._run.ahead(self._anchors) if isinstance(self._run, NativeForward) else None
