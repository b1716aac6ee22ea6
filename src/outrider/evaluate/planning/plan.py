"""What to run on this machine: drafters x lengths x batches ranked by expected tokens per second, plain decoding among them.

    tokens/s = batch * E[tokens per call] / seconds per step

The first factor comes from `scoring.score` (replay of texts of the target under the draft; content decides it, so it needs many
texts), the second from short runs of the real engine (the machine decides it, so it needs few). Their product has far less
noise than a benchmark of the same length, and says what limits a step. `plan_check` holds it against runs the plan has not seen.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from outrider.build import Engine, companion
from outrider.engine.prompts import Prompts
from outrider.errors import ConfigError
from outrider.evaluate.measure import Arm, check_answered, run_group
from outrider.evaluate.planning.vllm_draft import drafter_config
from outrider.evaluate.records import Record
from outrider.evaluate.scoring import score as ev
from outrider.evaluate.statistics.ratios import Array, difference_influence, influence, margin
from outrider.params import SamplingParams
from outrider.records import PHASES, Counts
from outrider.theory import forecast as fc
from outrider.theory.replay import Text, Verification
from outrider.theory.speedup import break_even_acceptance


@dataclass(frozen=True, slots=True)
class PlanEntry:
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


Key = tuple[str, int, int]
"""Of a configuration: drafter ("none" for plain decoding), length, batch."""


@dataclass(slots=True)
class StepTiming:
    """Runs of one configuration: those the plan may look at, and those it is checked against."""

    batch: int
    planned: list[Record] = field(default_factory=list)
    checked: list[Record] = field(default_factory=list)

    @property
    def counts(self) -> Counts:
        out = Counts()
        for r in self.planned:
            out.merge(r.counts)
        return out

    @property
    def step(self) -> float:
        """Seconds per step of the whole batch, the prompt's own step included as it is in any run."""
        return self.batch * sum(r.seconds for r in self.planned) / max(1, self.counts.steps)

    def steps(self) -> tuple[Array, Array]:
        """[runs] seconds and sequence-steps."""
        return (
            np.array([r.seconds for r in self.planned], dtype=float),
            np.array([r.counts.steps for r in self.planned], dtype=float),
        )

    def phases(self) -> dict[str, float]:
        """Seconds of a step by phase."""
        total = {p: sum(r.phases[p] for r in self.planned) for p in PHASES}
        return {p: x / (sum(total.values()) or 1.0) * self.step for p, x in total.items()}


PLAIN = "none"


def configurations(
    drafts: str | Sequence[str], lengths: Sequence[int], batches: Sequence[int], idle: Sequence[str] = (PLAIN,)
) -> list[Key]:
    """Every combination once; length 0, and a drafter of `idle`, is plain decoding, which stands there once a batch."""
    drafts = [drafts] if isinstance(drafts, str) else drafts
    every = (
        (PLAIN, 0, batch) if n == 0 or d in idle else (d, n, batch)
        for batch in batches
        for d in drafts
        for n in lengths
    )
    return list(dict.fromkeys(every))


def idle_drafters(engine: Engine, drafts: Sequence[str]) -> list[str]:
    """Those that never propose anything on this target: plain decoding under another name."""
    made = {d: companion(engine, d).parts.drafter for d in drafts}
    return [d for d, drafter in made.items() if not drafter.max_nodes]


def never_drafted(timings: Mapping[Key, StepTiming]) -> list[Key]:
    """Configurations that could have drafted and did not, on any prompt: their speed is plain decoding's, up to noise."""
    return [key for key, t in timings.items() if key[1] and not t.counts.proposed]


def time_steps(
    engine: Engine, prompts: Prompts, keys: Sequence[Key], params: SamplingParams, *, rounds: int = 4,
    check: bool = False, seed: int = 0, progress: Callable[[float], None] = lambda _: None,
) -> dict[Key, StepTiming]:  # fmt: skip
    """Short runs of every configuration, interleaved in random order; the first round warms up and is thrown away.

    Each configuration gets `rounds` runs on prompts from all over the set. check: besides, every configuration decodes every
    prompt once, with seeds that the plan has not seen, in between its other runs: what slows the machine down for a while slows
    both. A batch that the prompts do not fill is filled from their start.
    """
    texts = engine.encode_all(prompts)
    arms = {k: Arm(str(k), companion(engine, k[0], length=k[1], slots=k[2])) for k in keys}
    out = {key: StepTiming(key[2]) for key in keys}
    work = [(turn, key, kind) for key in keys for turn, kind in turns_of(key[2], len(texts), rounds, check)]
    chance = random.Random(seed)
    work.sort(key=lambda w: (w[0], chance.random()))
    for key, arm in arms.items():
        run_group(arm, *_group(texts, params, key[2], 0, 0), (0, 0, 0))
    for done, (turn, key, kind) in enumerate(work):
        group = round(turn * len(texts)) // key[2] * key[2]
        stream = 1_000_003 * (2 if kind == "checked" else 1) + 7 * seed
        record = run_group(arms[key], *_group(texts, params, key[2], group, stream), (group // key[2], 0, 0))
        getattr(out[key], kind).append(record)
        progress((done + 1) / len(work))
    for timing in out.values():
        check_answered(timing.planned)
    return out


def turns_of(batch: int, prompts: int, rounds: int, check: bool) -> list[tuple[float, str]]:
    """When (from 0 to below 1) a configuration has its runs, and of which kind: spread evenly over the whole time."""
    out = [(i / rounds, "planned") for i in range(rounds)]
    return out + [(start / prompts, "checked") for start in range(0, prompts, batch)] if check else out


def _group(
    prompts: list[list[int]], params: SamplingParams, batch: int, start: int, stream: int
) -> tuple[list[list[int]], list[SamplingParams]]:
    """`batch` prompts from `start` on, and their parameters with seeds of this stream."""
    places = range(start, start + batch)
    return [prompts[i % len(prompts)] for i in places], [replace(params, seed=stream + 31 * i) for i in places]


def tokens_per_call(
    texts: Sequence[Text], lengths: Sequence[int], verification: Verification = "token"
) -> dict[int, fc.Estimate]:
    """Predicted tokens per target call by length; 1 for length 0."""
    found = fc.forecast(texts, verification=verification, lengths=[n for n in lengths if n])
    return {0: fc.Estimate(1.0, 1.0, 1.0), **{row.length: row.acceptance_length for row in found.lengths}}


def own_rate(t: StepTiming) -> fc.Estimate:
    """Tokens per call as counted in the timing runs, with an interval over them: for drafters without a distribution to replay."""
    tokens = np.array([r.counts.tokens for r in t.planned], dtype=float)
    steps = t.steps()[1]
    value, wide = float(tokens.sum() / steps.sum()), margin([difference_influence(tokens, steps)])
    return fc.Estimate(value, value - wide, value + wide)


def rank(timings: Mapping[Key, StepTiming], calls: Mapping[str, Mapping[int, fc.Estimate]]) -> list[PlanEntry]:
    """All configurations, the fastest first. calls: per drafter the prediction; a drafter without one uses its own counts.

    The interval adds the errors of log tokens per call and of log seconds per step, which come from different runs.
    """
    out = []
    for (draft, n, batch), t in timings.items():
        e = fc.Estimate(1.0, 1.0, 1.0) if n == 0 else calls[draft][n] if draft in calls else own_rate(t)
        wide = math.hypot(margin([influence(*t.steps())]), (e.high - e.low) / 2 / e.value)
        plain = timings.get(("none", 0, batch))
        even = break_even_acceptance(n, 0.0, t.step / plain.step) if n and plain is not None else None
        phases, value = t.phases(), batch * e.value / t.step
        measured = sum(r.tokens for r in t.planned) / sum(r.seconds for r in t.planned)
        out.append(
            PlanEntry(
                draft, n, batch, value, value * math.exp(-wide), value * math.exp(wide), e.value, phases, even,
                max(PHASES, key=lambda p: phases[p]), measured,
            )
        )  # fmt: skip
    return sorted(out, key=lambda c: -c.tokens_per_second)


def advice(
    choices: Sequence[PlanEntry], batch: int, models: Mapping[str, str], rule: str = "auto", target: str | None = None
) -> dict[str, Any]:
    """The first choice at a batch size: options for `generate`, vLLM's configuration, and what would change the answer.

    models, target: the draft model behind the name of a drafter, and the target's folder, for vLLM. Raises ConfigError for a batch
    that was not planned.
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
    if not best.plain and rule != "auto":
        options += ["--rule", rule]
    return {
        "choice": best.name,
        "speculate": not best.plain,
        "tied": tied,
        "speedup": gain,
        "bottleneck": best.bottleneck,
        "what_would_change_it": change,
        "options": options,
        "vllm": None if best.plain else vllm(best, models, target),
    }


def vllm(c: PlanEntry, models: Mapping[str, str], target: str | None = None) -> str | None:
    """vLLM's `--speculative-config` for a choice; None for a drafter that its newest release does not have."""
    config = drafter_config(c.draft, models, target)
    return None if config is None else json.dumps({**config, "num_speculative_tokens": c.length})


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
