"""Jacobi drafting: the next draft is drawn from the distributions that the last pass computed behind its first rejection. No model.

Speculative Jacobi decoding (Teng et al., ICLR 2025): a pass gives the target's distribution at every place of a window of guesses,
each given the guesses before it. The guesses behind the first rejection are drawn again, from those distributions, and declared so.
Drawn with noise keyed by the absolute place, a guess changes only where its distribution did (MC-SJD, arXiv 2510.24211, by maximal
coupling; here by one exponential race for all passes), and with rule `match` the guesses move towards the seeded text itself.

Exact with rules that judge token by token: the distribution of a guess depends on guesses at earlier places of an earlier pass, and
no decision about an earlier place reads the noise of a later one; a judged place is never drawn again. A rule whose decision reads
the guesses below it (`reads_below`) would let a place be drawn twice with noise that has already decided something: it is refused
when the engine is built, unless the noise is fresh in every pass.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import LevelLogits, Levels
from outrider.drafters.tree.shapes import levels
from outrider.errors import ConfigError
from outrider.types import Draft, Evidence, SequenceView

FORM = re.compile(r"jacobi(?::(?P<window>\d{1,4}))?(?::(?P<up>up)(?P<columns>\d{1,4})?)?(?::(?P<fresh>fresh))?")


class Jacobi:
    """Windows of `window` guesses. columns: tokens of an image row; 0: places that no pass has seen yet take the nearest known
    distribution, else the token one row above, as a point mass. keyed: draw with noise keyed by absolute place, or fresh noise.

    A place that was judged, or whose window was cut by a shorter budget, starts anew. It keeps nothing between steps.
    """

    name = "jacobi"
    layers: tuple[int, ...] = ()
    trees = False

    def __init__(self, window: int, vocab_size: int, *, columns: int = 0, keyed: bool = True) -> None:
        if window < 1:
            raise ConfigError(f"the window of Jacobi drafting must be >= 1, got {window}; use 'none' to draft nothing")
        self.max_depth = self.max_nodes = window
        self.columns, self.keyed = columns, keyed
        self.growth = Levels(levels((1,) * window), vocab_size, sample="coupled" if keyed else "sampled")

    def bind(self, slots: int, length: int) -> None:
        """Nothing to allocate."""

    def release(self, slots: Sequence[int]) -> None:
        """Nothing is kept."""

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """One chain per sequence that had a verdict. The distributions behind the rejection come from the scored rows."""
        known = [_rows_behind(evidence, i) if depth > 0 else [] for i, depth in enumerate(budget)]
        depths = [min(depth, self.max_depth) if rows else 0 for depth, rows in zip(budget, known, strict=True)]
        forest = Forest(len(budget))
        live = [i for i, depth in enumerate(depths) if depth]
        if live:
            each = [self._logits(evidence, i, known[i], max(depths)) for i in live]
            logits = torch.stack(each, 1)
            self.growth.grow(evidence, depths, forest, logits[0], LevelLogits(logits, depths, forest))
        return forest.draft(evidence.scores.logits.device, self.growth.siblings)

    def _logits(self, evidence: Evidence, i: int, known: list[int], depth: int) -> Float[Tensor, "d V"]:
        """Logits of the next `depth` places of sequence i: of the scored rows behind the rejection, then of the start."""
        scores, view = evidence.scores.logits, evidence.sequences[i]
        rows = [*known[1 : depth + 1]]
        missing = depth - len(rows)
        if not self.columns:  # the nearest distribution: of the last row that is known
            return scores[rows + [known[-1]] * missing]
        out = scores.new_full((depth, scores.shape[1]), -torch.inf)
        out[: len(rows)] = scores[rows]
        for d in range(len(rows), depth):
            token = _above(view, len(view.tokens) + d - self.columns)
            if token >= 0:
                out[d, token] = 0.0
            else:
                out[d] = scores[known[-1]]
        return out


def _above(view: SequenceView, place: int) -> int:
    """The output token at `place`; -1 where it is the prompt's, or still to come."""
    return view.tokens[place] if view.prompt <= place < len(view.tokens) else -1


def _rows_behind(evidence: Evidence, i: int) -> list[int]:
    """Scored rows of sequence i: the one that gave its new anchor, then those of the guesses behind it that were not kept, the
    rejected one first. Of a tree, along first children. Empty without a verdict."""
    b = evidence.verdict_index[i]
    if b < 0:
        return []
    draft, path = evidence.draft, evidence.verdict.path[b]
    below: dict[int, int] = {}
    for k in draft.nodes(b):
        below.setdefault(draft.parent[k], k)
    node = path[-1] if path else -1
    rows = [draft.row(b, node)]
    while (node := below.get(node, -1)) >= 0:
        rows.append(draft.row(b, node))
    return rows


def parse_jacobi(spec: str, length: int, vocab_size: int, columns: int) -> Jacobi:
    """The drafter of 'jacobi', 'jacobi:8', 'jacobi:8:up', 'jacobi:8:up32', each with ':fresh' for fresh noise.

    length: the draft length, which is the window if none is written. columns: of the target's image rows, 0 if it draws no images.
    """
    found = FORM.fullmatch(spec)
    if found is None:
        raise ConfigError(
            f"Jacobi drafting is written 'jacobi:WINDOW', 'jacobi:WINDOW:up' or 'jacobi:WINDOW:fresh', got {spec!r}"
        )
    window = int(found["window"] or length)
    if window > length:
        raise ConfigError(f"the window of {spec!r} has {window} places, the draft length is {length}: raise the length")
    if found["up"]:
        columns = int(found["columns"] or columns)
        if not columns:
            raise ConfigError(
                f"{spec!r} needs the length of an image row, and this target has no raster.json: write 'up32' for 32"
            )
    return Jacobi(window, vocab_size, columns=columns if found["up"] else 0, keyed=not found["fresh"])
