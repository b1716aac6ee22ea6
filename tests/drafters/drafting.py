"""Evidence made by hand: what a drafter sees, without an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import BestFirst, Levels
from outrider.noise import Noise
from outrider.params import SamplingParams
from outrider.records import StepRecord
from outrider.sampling.pipeline import LogitsPipeline
from outrider.types import Draft, Evidence, LogitsProcessing, Rows, Scores, SequenceView, Verdict


def view(
    tokens: list[int], slot: int = 0, *, prompt: int = 1, seed: int = 0, cached: int | None = None, **params
) -> SequenceView:
    """A sequence after a decode step: everything but the anchor is cached."""
    return SequenceView(
        slot, seed, tokens, prompt, len(tokens) - 1 if cached is None else cached, SamplingParams(**params)
    )


def evidence(views: Sequence[SequenceView], vocab_size: int, pipeline: LogitsProcessing | None = None) -> Evidence:
    """The evidence of a step whose forward nobody looks at."""
    nothing = torch.empty(0, dtype=torch.int64)
    noise = Noise(tuple(v.seed for v in views), tuple(len(v.tokens) - 1 for v in views))
    return Evidence(
        rows=Rows(nothing, nothing, (), nothing),
        scores=Scores(torch.empty(0, vocab_size)),
        draft=Draft.empty(0),
        verdict=Verdict((), (), (), (), (), ()),
        sequences=tuple(views),
        segment_index=(-1,) * len(views),
        verdict_index=(-1,) * len(views),
        noise=noise,
        pipeline=LogitsPipeline(vocab_size) if pipeline is None else pipeline,
    )


def chain(draft: Draft, i: int = 0) -> list[int]:
    """The tokens of sequence i."""
    return list(draft.tokens[draft.offsets[i] : draft.offsets[i + 1]])


class Pausing:
    """A controller that asks for nothing for six steps, then for three tokens in two."""

    def __init__(self) -> None:
        self.steps = 0

    def budget(self, sequences: Sequence[SequenceView]) -> list[int]:
        self.steps += 1
        return [3 * (self.steps % 8 > 5)] * len(sequences)

    def observe(self, record: StepRecord) -> None:
        """Nothing is learnt."""


class Seen:
    """Wraps a growth: keeps the logits it was given, by sequence and path."""

    def __init__(self, inner: Levels | BestFirst) -> None:
        self.inner, self.logits = inner, {}
        self.siblings = inner.siblings
        self.depth, self.nodes, self.max_expanded_nodes, self.trees = (
            inner.depth,
            inner.nodes,
            inner.max_expanded_nodes,
            inner.trees,
        )

    def along(self) -> list[tuple[tuple[int, ...], tuple[int, ...], list[torch.Tensor]]]:
        """(history, path, the rows from the anchor's to the path's end) of every path that none goes on: each row is in one."""
        begun = {(history, path[:n]) for history, path in self.logits for n in range(len(path))}
        return [
            (history, path, [self.logits[history, path[:n]] for n in range(len(path) + 1)])
            for history, path in self.logits
            if (history, path) not in begun
        ]

    def forget(self, slots: Sequence[int]) -> None:
        self.inner.forget(slots)

    def grow(self, evidence: Evidence, depths, forest: Forest, logits, follow) -> None:
        live = [i for i, d in enumerate(depths) if d]
        history = {i: tuple(evidence.sequences[i].tokens) for i in live}
        for i, row in zip(live, logits, strict=True):
            self.logits[history[i], ()] = row.clone()

        def watched(frontier):
            out = follow(frontier)
            for (i, k), row in zip(frontier, out, strict=True):
                self.logits[history[i], forest.path(i, k)] = row.clone()
            return out

        self.inner.grow(evidence, depths, forest, logits, watched)


def check_parity(model: Any, seen: Seen, states: Callable[[tuple[int, ...]], torch.Tensor]) -> None:
    """Every logit that was served is that of the unroll of its tokens. states: the target's hidden states of a text."""
    for history, path, rows in seen.along():
        known = len(history) - 1  # the anchor has no hidden state yet
        found = model.unroll(torch.tensor([[*history, *path]]), states(history)[None, :known], len(rows))
        for row, level in zip(rows, found, strict=True):
            torch.testing.assert_close(row, level[0, known - 1], rtol=0, atol=2e-4)  # states went through float32
