"""What the parts of `agreement.py` share: the pair, the prompts, runs through the engine and texts scored under both models."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from outrider.build import Engine, companion
from outrider.engine.outputs import Result
from outrider.evaluate.scoring import score as predict
from outrider.params import SamplingParams
from outrider.records import Counts
from outrider.train import data


@dataclass(frozen=True)
class Setting:
    """What every part shares."""

    engine: Engine
    draft: str
    prompts: list[str]
    tokens: int
    slots: int = 8

    def params(self, temperature: float, n: int = 1) -> SamplingParams:
        return SamplingParams(temperature=temperature, max_tokens=self.tokens, ignore_eos=True, n=n)

    def run(self, temperature: float, seed: int, **changes: Any) -> list[Result]:
        """Every prompt once, with its own seed, through an engine that shares the weights."""
        draft = changes.pop("drafter", self.draft)
        engine = companion(self.engine, draft, slots=self.slots, max_length=512, **changes)
        params = [replace(self.params(temperature), seed=seed * 100_003 + i) for i in range(len(self.prompts))]
        return engine.generate(self.prompts, params)


def held_out_prompts(engine: Engine, count: int, size: int = 48) -> list[str]:
    """`count` pieces of `size` tokens, spread over the held-out files."""
    _, held_out = data.split(data.deduplicate(data.find_documents(Path(sysconfig.get_path("stdlib")))))
    pieces = []
    for document in held_out:
        ids = engine.encode(document.text)
        pieces += [ids[i : i + size] for i in range(0, len(ids) - size, 4 * size)]
    pick = np.random.default_rng(7).permutation(len(pieces))[:count]
    return [engine.tokenizer.decode(pieces[i]) for i in sorted(pick)]


def score(s: Setting, temperature: float, samples: int, seed: int, rows: int = 512) -> predict.Scored:
    """`samples` plain texts of every prompt under both models."""
    items, params, clock = [predict.Item(p) for p in s.prompts], s.params(temperature, samples), predict.Clock()
    emitted = predict.sample(s.engine, items, params, clock, lambda x: None, batch=s.slots, seed=seed)
    draft = predict.draft_model(s.engine)
    return predict.score(s.engine, draft, emitted, items, params, clock, lambda x: None, rows=rows, seed=seed)


def sums(results: Sequence[Result]) -> Counts:
    total = Counts()
    for result in results:
        total.merge(result.outputs[0].counts)
    return total
