"""Serving the network: a slot keeps the hidden state of its last kept row, and every level of a draft comes from it."""

from __future__ import annotations

from pathlib import Path

from outrider.drafters.last_state import LastStateDrafter
from outrider.drafters.spec import DraftSpec
from outrider.drafters.tree.growth import Growth
from outrider.protocols import Drafter, Target

from .network import LinearNetwork


class LinearDrafter(LastStateDrafter):
    """Drafts with a `LinearNetwork`. growth: how trees grow; its depth is at most the network's levels."""

    def __init__(self, network: LinearNetwork, growth: Growth, *, name: str = "linear") -> None:
        c, dtype = network.config, network.step.weight.dtype
        super().__init__(network, tap=c.tap, levels=c.levels, growth=growth, dtype=dtype, name=name)


def load(folder: Path, target: Target, spec: DraftSpec, target_path: str | None) -> Drafter:
    """The drafter of a folder for `target`, see `registry.LearnedDrafter`."""
    network = LinearNetwork.load(folder, target).to(target.device)
    return LinearDrafter(network, spec.at_most(network.config.levels).growth(target.vocab_size))
