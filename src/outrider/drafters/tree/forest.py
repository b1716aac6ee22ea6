"""A draft under construction: one tree per sequence, grown node by node, then flattened."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.types import POINT_MASS, Draft, Proposal, Siblings


class Forest:
    """Trees of `sequences` sequences. Nodes of a sequence are numbered from 0 in the order they are added.

    tokens[i], parent[i], row[i], paths[i]: per node of sequence i its token, its parent (-1: the anchor), the number of
    its distribution (POINT_MASS: none) and the tokens from the anchor's child down to it.
    """

    def __init__(self, sequences: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(sequences)]
        self.parent: list[list[int]] = [[] for _ in range(sequences)]
        self.row: list[list[int]] = [[] for _ in range(sequences)]
        self.paths: list[list[tuple[int, ...]]] = [[] for _ in range(sequences)]
        self._distributions: list[Tensor] = []
        self._rows = 0
        self._sound = True

    def add(self, i: int, parent: int, token: int, row: int = POINT_MASS) -> int:
        """Add a node under `parent` to sequence i; its number."""
        above = () if parent < 0 else self.paths[i][parent]
        self.tokens[i].append(token)
        self.parent[i].append(parent)
        self.row[i].append(row)
        self.paths[i].append((*above, token))
        return len(self.tokens[i]) - 1

    def add_chain(self, i: int, tokens: Sequence[int], row: Sequence[int]) -> None:
        """Add a chain below the anchor of sequence i, which has no nodes yet."""
        self.tokens[i] += tokens
        self.parent[i] += range(-1, len(tokens) - 1)
        self.row[i] += row
        self.paths[i] += [tuple(tokens[:n]) for n in range(1, len(tokens) + 1)]

    def keep(self, i: int, nodes: Sequence[int]) -> None:
        """Keep only `nodes` of sequence i, in ascending order; every node's parent must be among them."""
        new = {-1: -1} | {k: n for n, k in enumerate(nodes)}
        self.parent[i] = [new[self.parent[i][k]] for k in nodes]
        self.tokens[i] = [self.tokens[i][k] for k in nodes]
        self.row[i] = [self.row[i][k] for k in nodes]
        self.paths[i] = [self.paths[i][k] for k in nodes]

    def path(self, i: int, node: int) -> tuple[int, ...]:
        """Tokens from the anchor's child down to `node` of sequence i; empty for the anchor (-1)."""
        return () if node < 0 else self.paths[i][node]

    def add_distributions(self, probs: Float[Tensor, "r V"], sound: bool = False) -> int:
        """Store distributions that nodes were drawn from; returns the number of the first. sound: as in `Proposal`, checked by the
        caller."""
        first = self._rows
        self._distributions.append(probs)
        self._rows += probs.shape[0]
        self._sound &= sound
        return first

    def nodes(self, index: Sequence[int], device: torch.device) -> Draft:
        """The trees of the sequences `index`, without their distributions."""
        return Draft.join([(self.tokens[i], self.parent[i]) for i in index], None, device)

    def draft(self, device: torch.device, siblings: Siblings) -> Draft:
        """All trees with their distributions, as a `Draft` on `device`."""
        row, q = tuple(r for rows in self.row for r in rows), None
        if any(r != POINT_MASS for r in row):
            probs = (self._distributions[0] if len(self._distributions) == 1 else torch.cat(self._distributions)).to(
                device
            )
            q = Proposal(probs, row, None, siblings, probs if self._sound else None)
        return Draft.join(list(zip(self.tokens, self.parent, strict=True)), q, device)


def chains(tokens: Sequence[Sequence[int]], device: torch.device) -> Draft:
    """One chain of point masses per sequence (empty: no proposal)."""
    return Draft.join([(chain, range(-1, len(chain) - 1)) for chain in tokens], None, device)
