"""What to run on this machine: drafters x lengths x batches ranked by expected tokens per second, plain decoding among them.

    tokens/s = batch * E[tokens per call] / seconds per step

The first factor comes from `predict` (replay of texts of the target under the draft; content decides it, so it needs many texts),
the second from short runs of the real engine (the machine decides it, so it needs few). Their product has far less noise than a
benchmark of the same length, and says what limits a step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from outrider.engine.build import Options, assemble
from outrider.engine.engine import Engine
from outrider.errors import ConfigError
from outrider.evaluate import predict as ev
from outrider.evaluate.measure import Arm, Record, run_group
from outrider.sampling.params import SamplingParams
from outrider.theory import forecast as fc
from outrider.theory.replay import Text
from outrider.theory.speedup import break_even_acceptance
from outrider.types import PHASES, Counts


@dataclass(frozen=True, slots=True)
class Choice:
    """One configuration. tokens_per_second in [low, high] (95%: prompts and timing); tokens_per_call as predicted.

    seconds: of a step, by phase. break_even: acceptance below which it is slower than plain decoding of the same batch (None for
    plain). bottleneck: the phase that takes most of a step. measured: tokens per second of the timing runs themselves.
    """

    draft: str
    length: int
    batch: int
    tokens_per_second: float
    low: float
    high: float
    tokens_per_call: float
    seconds: dict[str, float]
    break_even: float | None
    bottleneck: str
    measured: float

    @property
    def plain(self) -> bool:
        return self.length == 0

    @property
    def name(self) -> str:
        return f"plain, batch {self.batch}" if self.plain else f"{self.draft}, length {self.length}, batch {self.batch}"


@dataclass(slots=True)
class Timing:
    """Steps of one configuration: seconds per step of each round, and the mean by phase."""

    rounds: list[float]
    phases: dict[str, float]
    counts: Counts
    tokens: int
    seconds: float


def time_steps(
    engine: Engine, prompts: list[list[int]], drafts: Sequence[str], lengths: Sequence[int], batches: Sequence[int],
    params: SamplingParams, *, rounds: int = 4, progress: Callable[[float], None] = lambda _: None,
) -> dict[tuple[str, int, int], Timing]:  # fmt: skip
    """Short interleaved runs of every configuration; the first round warms up and is thrown away.

    Times are of steps in which all sequences of the batch decode: every text has the same length. Prompts are used in turn.
    """
    base: Options = engine.loaded.options
    arms: dict[tuple[str, int, int], Engine] = {}
    for batch in batches:
        for draft in drafts:
            for n in lengths:
                key = ("none" if n == 0 else draft, n, batch)
                if key not in arms:
                    arms[key] = assemble(engine.loaded, replace(base, draft=key[0], length=n, slots=batch))
    out = {key: Timing([], dict.fromkeys(PHASES, 0.0), Counts(), 0, 0.0) for key in arms}
    for turn in range(rounds + 1):
        for key, one in arms.items():
            group = [prompts[(turn * key[2] + i) % len(prompts)] for i in range(key[2])]
            seeds = [replace(params, seed=1000 * turn + i) for i in range(key[2])]
            if turn:
                note(out[key], run_group(Arm("", one), group, seeds, (0, turn, 0)), key[2])
            else:
                run_group(Arm("", one), group, seeds, (0, 0, 0))
        progress((turn + 1) / (rounds + 1))
    return out


def note(t: Timing, r: Record, batch: int) -> None:
    """Add one run: seconds per step of the whole batch, the prompt's own step included as it is in any run."""
    t.counts.merge(r.counts)
    t.tokens += r.tokens
    t.seconds += r.seconds
    steps = r.counts.steps / batch
    t.rounds.append(r.seconds / steps)
    for phase in PHASES:
        t.phases[phase] += r.phases[phase]


def tokens_per_call(texts: Sequence[Text], lengths: Sequence[int]) -> dict[int, fc.Estimate]:
    """Predicted tokens per target call by length; 1 for length 0."""
    found = fc.forecast(texts, lengths=[n for n in lengths if n])
    return {0: fc.Estimate(1.0, 1.0, 1.0), **{row.length: row.acceptance_length for row in found.lengths}}


def rank(
    timings: dict[tuple[str, int, int], Timing], calls: dict[str, dict[int, fc.Estimate]], *, seed: int = 0
) -> list[Choice]:
    """All configurations, the fastest first. calls: per drafter the prediction; a drafter without one uses its own counts."""
    chance = np.random.default_rng(seed)
    out = []
    for (draft, n, batch), t in timings.items():
        rounds = np.array(t.rounds)
        step = chance.choice(rounds, (2000, len(rounds))).mean(1)
        if n == 0:
            e = fc.Estimate(1.0, 1.0, 1.0)
        elif draft in calls:
            e = calls[draft][n]
        else:
            own = (t.counts.accepted + t.counts.steps) / t.counts.steps
            e = fc.Estimate(own, own, own)
        spread = (e.high - e.low) / 3.92
        rate = batch * (e.value + spread * chance.standard_normal(2000)) / step
        low, high = np.quantile(rate, [0.025, 0.975])
        seconds = {p: t.phases[p] / sum(t.phases.values()) * float(rounds.mean()) for p in PHASES}
        plain = timings.get(("none", 0, batch))
        even = None
        if n and plain is not None:
            cost = float(rounds.mean() / np.mean(plain.rounds))
            even = break_even_acceptance(n, 0.0, cost)
        best = max(PHASES, key=lambda p: seconds[p])
        value = batch * e.value / float(rounds.mean())
        out.append(
            Choice(draft, n, batch, value, float(low), float(high), e.value, seconds, even, best, t.tokens / t.seconds)
        )
    return sorted(out, key=lambda c: -c.tokens_per_second)


def advice(choices: Sequence[Choice], batch: int, models: Mapping[str, str]) -> dict[str, Any]:
    """The first choice at a batch size: options for `generate`, vLLM's configuration, and what would change the answer.

    models: the draft model behind the name of a drafter, for vLLM. Raises ConfigError for a batch that was not planned.
    """
    mine = [c for c in choices if c.batch == batch]
    if not mine:
        raise ConfigError(f"no configuration of batch {batch} was planned")
    best = mine[0]
    tied = [c.name for c in mine[1:] if c.high >= best.low]
    plain = next((c for c in mine if c.plain), None)
    gain = None if plain is None else best.tokens_per_second / plain.tokens_per_second
    change = (
        "a draft of higher acceptance or a cheaper one: nothing planned beats plain decoding"
        if best.plain
        else f"acceptance of a judged draft below {best.break_even:.2f} makes plain decoding faster"
        if best.break_even is not None
        else ""
    )
    options = ["--draft", "none"] if best.plain else ["--draft", best.draft, "--length", str(best.length)]
    return {
        "choice": best.name,
        "speculate": not best.plain,
        "tied": tied,
        "speedup": gain,
        "bottleneck": best.bottleneck,
        "what_would_change_it": change,
        "options": options,
        "vllm": None if best.plain else vllm(best, models),
    }


def vllm(c: Choice, models: Mapping[str, str]) -> str | None:
    """vLLM's `--speculative-config` for a choice; None for a drafter that vLLM does not have."""
    if c.draft == "ngram":
        return json.dumps({"method": "ngram", "num_speculative_tokens": c.length, "prompt_lookup_max": 4})
    if c.draft not in models:
        return None
    config = {"method": "draft_model", "model": models[c.draft], "num_speculative_tokens": c.length}
    return json.dumps({**config, "draft_sample_method": "probabilistic"})


def read_texts(
    engine: Engine,
    items: Sequence[ev.Item],
    params: SamplingParams,
    progress: Callable[[float], None],
    *,
    seed: int = 0,
) -> list[Text]:
    """Texts of the target scored under target and draft: what `predict` does, without its report."""
    model, clock = ev.draft_model(engine), ev.Clock()
    emitted = ev.sample(engine, items, params, clock, lambda f: progress(f / 2), seed=seed)
    return ev.score(
        engine, model, emitted, items, params, clock, lambda f: progress(0.5 + f / 2), rows=1, seed=seed
    ).texts
