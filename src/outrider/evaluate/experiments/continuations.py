"""The same continuations for every arm: how many target calls each arm would have needed for texts that no arm wrote.

One or several continuations per prompt are drawn from the target by plain decoding, and read once by the target and by each
draft model in a teacher-forced pass. `theory.replay` then gives every arm's expected number of target calls along them, exactly
given the text. A lossless arm's own text is distributed as these are, so that for every prompt

    E[target calls of the arm's own run] = E[expected calls along the continuations]                                      (1)

whatever the clock does. Arms that are not replayed (their number is None): drafters without a distribution (n-grams, heads, trees),
rules other than speculative sampling and block verification, lossy rules, draft lengths that change with the load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.combine import FirstOf
from outrider.drafters.forced import Forced
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.none import NoDraft
from outrider.drafters.prediction import PredictedOutput
from outrider.drafters.tree.growth import Levels
from outrider.errors import ConfigError
from outrider.evaluate.measure import Arm
from outrider.evaluate.scoring.score import VERIFICATION, Clock, Emitted, Item, score
from outrider.noise import derive_seed
from outrider.params import SamplingParams
from outrider.protocols import Target
from outrider.theory.replay import Drafting, Text, Verification, replay
from outrider.verify import load_rule

STREAM = 0x7E97
"""Sets the seeds of the continuations apart from those of the arms' own runs."""
DRAFTING: dict[str, Drafting] = {"sampled": "sampled", "greedy": "greedy"}


@dataclass(frozen=True, slots=True)
class Way:
    """What decides how an arm accepts: its draft model, length, and what `theory.replay` is told. model None: plain decoding."""

    model: Target | None
    length: int
    drafting: Drafting = "sampled"
    verification: Verification = "token"


def way_of(engine: Engine) -> Way | None:
    """How an engine's target calls follow from the logs of a text; None where they do not."""
    rule, control, drafter = engine.parts.rule, engine.controller, engine.parts.drafter
    length = min(control.length, drafter.max_depth) if isinstance(control, Fixed) else -1
    if length == 0 or drafter.max_depth == 0:
        return Way(None, 0)
    parts = drafter.parts if isinstance(drafter, FirstOf) else (drafter,)
    spoken = [p for p in parts if not isinstance(p, PredictedOutput | Forced)]  # an experiment asks for neither
    if length < 0 or len(spoken) != 1 or rule.name not in VERIFICATION:
        return None
    (model,) = spoken
    if not isinstance(model, ModelDrafter) or model.trees or not isinstance(model.growth, Levels):
        return None
    drafting = DRAFTING.get(model.growth.sample)
    return None if drafting is None else Way(model.model, length, drafting, VERIFICATION[rule.name])


class Continuations:
    """Draws the continuations of a prompt group and replays all arms along them; needs memory for one more KV cache.

    count: continuations per prompt, >= 1. prompts: all of the experiment, to size the cache. params: as the arms are asked, with
    `ignore_eos`, so that every text has the same number of tokens.
    """

    def __init__(
        self, arms: Sequence[Arm], prompts: Sequence[list[int]], params: SamplingParams, count: int, seed: int
    ) -> None:
        first = arms[0].engine
        self.ways = {arm.name: way_of(arm.engine) for arm in arms}
        if count < 1 or all(way is None or way.model is None for way in self.ways.values()):
            raise ConfigError(
                "replay needs an arm whose drafts have a distribution: a draft model with a chain, "
                "the rule speculative_sampling or block"
            )
        self.params, self.count, self.seed = params, count, seed
        length = min(max(map(len, prompts)) + params.max_tokens, first.max_length)
        self.plain = Engine(
            first.parts.target, NoDraft(), load_rule("auto"), Fixed(0), slots=8, max_length=length, eos=first.eos
        )

    def draw(self, prompts: Sequence[list[int]], first: int) -> list[Emitted]:
        """`count` continuations of each prompt by plain decoding. first: number of the first prompt within the experiment."""
        texts: list[Emitted] = []
        for turn in range(self.count):
            numbers = [(first + i) * self.count + turn + 1 for i in range(len(prompts))]
            seeds = [replace(self.params, seed=derive_seed(self.seed ^ STREAM, n) >> 1) for n in numbers]
            for i, result in enumerate(self.plain.generate(prompts, seeds)):
                texts.append(Emitted(list(result.prompt), list(result.outputs[0].token_ids), False, None, i))
        return texts

    def calls(self, texts: Sequence[Emitted]) -> dict[str, float]:
        """Expected target calls per token of every replayable arm along these texts, as a ratio of sums; 1 for plain decoding."""
        out = {name: 1.0 for name, way in self.ways.items() if way is not None and way.model is None}
        tokens = sum(len(e.output) for e in texts)
        if not tokens:
            return {}
        logs: dict[int, list[Text]] = {}
        for name, way in self.ways.items():
            if way is None or way.model is None:
                continue
            if id(way.model) not in logs:
                logs[id(way.model)] = self._read(way.model, texts)
            found = replay(logs[id(way.model)], way.length, way.drafting, way.verification)
            out[name] = float(np.sum(found.calls)) / tokens
        return out

    def _read(self, model: Target, texts: Sequence[Emitted]) -> list[Text]:
        """The logs of the texts under the target and this draft model."""
        items = [Item("")] * (1 + max(e.item for e in texts))
        return score(self.plain, model, texts, items, self.params, Clock(), lambda _: None, rows=1).texts
