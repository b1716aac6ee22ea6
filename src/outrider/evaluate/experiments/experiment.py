"""A/B experiments: arms on the same prompts in random order, an answer that may be read after every prompt, guards that veto."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from outrider.build import Engine, companion
from outrider.engine.prompts import Prompts
from outrider.errors import ConfigError, unknown_name
from outrider.evaluate.experiments.continuations import Continuations
from outrider.evaluate.experiments.control_variates import METRICS, Metric, Reduction, compare
from outrider.evaluate.measure import Arm, check_answered, grouped, run_group, text_seed
from outrider.evaluate.records import Record
from outrider.evaluate.scoring.quality import with_quality
from outrider.evaluate.statistics.sequential import Bounds, bounds
from outrider.evaluate.store.store import Store, fingerprint
from outrider.evaluate.workloads import Asked
from outrider.files import read_yaml
from outrider.options import types_of
from outrider.params import SamplingParams
from outrider.records import Counts
from outrider.telemetry.ledger import ledger
from outrider.verify import load_rule

MAX_BYTES = 1 << 20
VARIED = ("draft", "length", "rule", "allow_lossy", "draft_quantize", "draft_vocabulary")
"""Engine options that arms may vary: those that are not decided when the target is loaded."""
ARM_OPTIONS: dict[str, tuple[type, ...]] = {
    **{name: types_of(name) for name in VARIED},
    "tv_budget": (int, float),
}
NUMBERS = ("length", "tv_budget")


@dataclass(frozen=True, slots=True)
class Experiment:
    """What an experiment asks. See `read_experiment` for the file.

    arms: name -> engine options. base: the arm the others are compared with. min_effect: smallest share of speed that matters.
    level: probability that any false claim is ever made. quality: nats per token that may be lost, None: not scored.
    g: prior variance of the standardised effect (`sequential`). metric: speed (tokens per second), or acceptance (tokens per
    target call). replay: continuations per prompt along which all arms are replayed (`continuations`), 0: none.
    Of live traffic (`assignment`): shares: of each arm, equal ones if None; salt: of the hash that places users; each: requests
    of a user that make one value; window: seconds for which all requests have one arm, None: an arm belongs to a user.
    """

    name: str
    arms: dict[str, dict[str, Any]]
    base: str
    target: str | None = None
    prompts: str | None = None
    chat_template: bool = True
    count: int = 64
    batch: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 64
    min_effect: float = 0.05
    level: float = 0.05
    quality: float | None = None
    dtype: str = "auto"
    seed: int = 0
    sd: float | None = None
    g: float = 0.25
    metric: Metric = "speed"
    replay: int = 0
    shares: dict[str, float] | None = None
    salt: str = ""
    each: int = 1
    window: float | None = None

    @property
    def others(self) -> list[str]:
        return [a for a in self.arms if a != self.base]

    @property
    def lossy(self) -> list[str]:
        """The arms whose texts are not distributed as the target's: by their rule, or a budget of it that they may spend."""
        named = {a: options.get("rule") for a, options in self.arms.items()}
        budget = {a for a, options in self.arms.items() if options.get("tv_budget")}
        return [
            a
            for a, rule in named.items()
            if a in budget or (rule not in (None, "auto") and not load_rule(rule).lossless)
        ]

    @property
    def share(self) -> float:
        """Level of one comparison: speed and quality of every arm share `level` (Bonferroni)."""
        return self.level / (len(self.others) * (1 if self.quality is None else 2))


def read_experiment(path: Path) -> Experiment:
    """An experiment from a YAML file: the fields of `Experiment`; each arm any of ARM_OPTIONS.

    Raises ConfigError naming the nearest known field.
    """
    return experiment_from(read_yaml(path, MAX_BYTES), path.stem, path)


def experiment_from(found: Any, called: str, path: Path | str) -> Experiment:
    """An experiment from plain data, with the name `called` unless it has one. path: where it is from, for messages."""
    if not isinstance(found, dict) or not isinstance(found.get("arms"), dict) or len(found["arms"]) < 2:
        raise ConfigError(f"{path}: an experiment is a mapping with at least two `arms`")
    found = dict(found)
    known = Experiment.__dataclass_fields__
    for key in found:
        if key not in known:
            raise ConfigError(f"{path}: {unknown_name('field', str(key), known)}")
    arms = found.pop("arms")
    if not all(isinstance(options, dict) or options is None for options in arms.values()):
        raise ConfigError(f"{path}: every arm is a mapping of options, such as {{draft: none}}")
    arms = {str(name): dict(options or {}) for name, options in arms.items()}
    for name, options in arms.items():
        for key, value in options.items():
            if key not in ARM_OPTIONS:
                raise ConfigError(f"{path}: arm {name!r}: {unknown_name('option', str(key), ARM_OPTIONS)}")
            if type(value) not in ARM_OPTIONS[key] or (key in NUMBERS and not 0 <= value < math.inf):
                raise ConfigError(f"{path}: arm {name!r}: {key} cannot be {str(value)[:80]!r}")
        _check_rule(options.get("rule"), f"{path}: arm {name!r}")
    made = {"name": called, "base": next(iter(arms)), "arms": arms, **found}
    try:
        experiment = TypeAdapter(Experiment).validate_json(json.dumps(made, default=str), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(x) for x in first["loc"])
        raise ConfigError(f"{path}: {where}: {first['msg']}, got {str(first['input'])[:80]!r}") from None
    _check(experiment, path)
    return experiment


def _check_rule(rule: Any, where: str) -> None:
    try:
        if rule not in (None, "auto"):
            load_rule(rule)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def changed(e: Experiment, *, replay: int | None = None, metric: str | None = None) -> Experiment:
    """The experiment with other ways to measure it, None: as the file has them. Raises ConfigError for a metric there is not."""
    if metric is not None and metric not in METRICS:
        raise ConfigError(unknown_name("metric", metric, METRICS))
    return replace(e, replay=e.replay if replay is None else replay, metric=cast(Metric, metric or e.metric))


def _check(e: Experiment, path: Path | str) -> None:
    if e.base not in e.arms:
        raise ConfigError(f"{path}: {unknown_name('arm', e.base, e.arms)}")
    if e.shares is not None and (set(e.shares) != set(e.arms) or not all(0 < s <= 1 for s in e.shares.values())):
        raise ConfigError(f"{path}: shares must name every arm once, each between 0 and 1")
    for name, low, high in (
        ("min_effect", 0, 10),
        ("level", 0, 1),
        ("g", 0, 1e6),
        ("count", 1, 1e6),
        ("batch", 0, 1e4),
        ("max_tokens", 0, 1e6),
        ("replay", -1, 65),
        ("each", 0, 1e6),
        ("window", 0, 1e6),
    ):
        value = getattr(e, name)
        if value is not None and not low < value < high:
            raise ConfigError(f"{path}: {name} must be a number between {low} and {high:g}, got {value!r}")


def build_arms(engine: Engine, experiment: Experiment) -> list[Arm]:
    """One engine per arm on the weights of `engine`. Raises ConfigError for an option that only requests have."""
    for name, options in experiment.arms.items():
        if "tv_budget" in options:
            raise ConfigError(
                f"arm {name!r}: tv_budget is for live requests: name the rule, such as tv_budget:per_sequence=2"
            )
    return [Arm(name, companion(engine, **options)) for name, options in experiment.arms.items()]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm against the base. speed: log ratio of the metric; quality: nats per token lost. vetoes: failed guards.

    decision: better, worse, equivalent (within min_effect), vetoed, or undecided. reduction: what replay did for `speed`.
    """

    arm: str
    speed: Bounds
    quality: Bounds | None
    vetoes: tuple[str, ...]
    decision: str
    reduction: Reduction | None = None

    @property
    def ratio(self) -> tuple[float, float, float]:
        """Speed-up over the base with its interval."""
        high = self.speed.high  # infinite while there are too few groups: no number stands for that
        return (
            math.exp(self.speed.mean),
            math.exp(self.speed.low),
            math.exp(min(high, 700)) if high < math.inf else high,
        )


@dataclass(frozen=True, slots=True)
class State:
    """Where an experiment stands: prompt groups that all arms have finished, and the comparisons. data: what a report says of the
    prompts (`workloads.Ready`), where it is known."""

    groups: int
    total: int
    comparisons: list[Comparison] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def decided(self) -> bool:
        return bool(self.comparisons) and all(c.decision != "undecided" for c in self.comparisons)


def analyse(experiment: Experiment, records: Sequence[Record], total: int) -> State:
    """Everything the records say now. Groups with a failed request in any arm enter nothing."""
    by = {(r.arm, r.group): r for r in records}
    groups = [g for g in sorted({r.group for r in records}) if all((a, g) in by for a in experiment.arms)]
    good = [g for g in groups if not any(by[a, g].failed for a in experiment.arms)]
    out = []
    for arm in experiment.others:
        pairs = [(by[arm, g], by[experiment.base, g]) for g in good]
        speed, reduction = compare(experiment.metric, experiment.share, experiment.g, pairs)
        quality = None
        if experiment.quality is not None:
            lost = [_nll(a) - _nll(b) for a, b in pairs if a.nll is not None and b.nll is not None]
            quality = bounds(lost, experiment.share, experiment.g)
        vetoes = guards(experiment, arm, records, quality)
        if reduction is not None and not reduction.agrees:
            vetoes += (f"replay disagrees: {reduction.gap.mean:+.3f} target calls per token beyond what it expects",)
        decision = decide(experiment, speed, quality, vetoes)
        out.append(Comparison(arm, speed, quality, vetoes, decision, reduction))
    return State(len(groups), total, out)


def _nll(record: Record) -> float:
    return (record.nll or 0.0) / max(1, record.tokens)


def guards(experiment: Experiment, arm: str, records: Sequence[Record], quality: Bounds | None) -> tuple[str, ...]:
    """What forbids a winner: failures, loops, a ledger that disagrees, quality lost beyond the margin."""
    mine, base = ([r for r in records if r.arm == a] for a in (arm, experiment.base))
    out = []
    if (failed := sum(r.failed for r in mine)) > sum(r.failed for r in base):
        out.append(f"{failed} failed requests")
    texts = max(1, sum(len(r.timings) for r in mine))
    loops, usual = sum(r.loops for r in mine), sum(r.loops for r in base)
    if loops > usual + 3 * math.sqrt(usual + 1) and loops > 0.05 * texts:
        out.append(f"{loops} of {texts} texts end in a loop, {usual} in the base")
    counts = Counts()
    for r in mine:
        counts.merge(r.counts)
    if not ledger(counts, level=1e-4).agrees:
        out.append(f"the ledger disagrees: predicted {counts.risk:.1f} rejections, observed {counts.rejected}")
    if quality is not None and experiment.quality is not None and quality.low > experiment.quality:
        out.append(f"quality: at least {quality.low:.3f} nats per token lost")
    return tuple(out)


def decide(experiment: Experiment, speed: Bounds, quality: Bounds | None, vetoes: tuple[str, ...]) -> str:
    """The decision the intervals allow. A better arm must also have its quality shown not to be inferior."""
    if vetoes:
        return "vetoed"
    effect = math.log1p(experiment.min_effect)
    if speed.high < 0:
        return "worse"
    if -effect < speed.low and speed.high < effect:
        return "equivalent"
    safe = quality is None or experiment.quality is None or quality.high < experiment.quality
    return "better" if speed.low > 0 and safe else "undecided"


def run_experiment(
    experiment: Experiment,
    arms: list[Arm],
    prompts: Prompts,
    store: Store,
    *,
    later: Sequence[Asked | None] = (),
    data: Mapping[str, Any] | None = None,
    stop_early: bool = True,
    progress: Callable[[State], None] = lambda _: None,
) -> State:
    """Run until every comparison is decided or the prompts are used up; every record is committed as it comes.

    later: of each prompt, what is asked behind its replies. data: what a report says of the prompts. An interrupted experiment goes
    on where it was. Raises ConfigError if its file has changed since.
    """
    texts = arms[0].engine.encode_all(prompts)
    turns = [list(one.row.turns) for one in later if one is not None]
    config = {**asdict(experiment), "prompts": fingerprint([*texts, *turns])}
    run = store.begin("ab", experiment.name, config)
    known = {key: Record.from_dict(data) for key, data in store.records(run).items()}
    params = SamplingParams(
        temperature=experiment.temperature, top_p=experiment.top_p, max_tokens=experiment.max_tokens, ignore_eos=True
    )
    batch = experiment.batch
    groups, behind = grouped(texts, batch), grouped(later, batch)
    along = Continuations(arms, texts, params, experiment.replay, experiment.seed) if experiment.replay else None
    order, target = random.Random(experiment.seed), arms[0].engine.parts.target
    if len(known) < len(groups) * len(arms):
        for arm in arms:
            run_group(arm, groups[0], [params] * len(groups[0]), (0, -1, 0), *behind[:1])
    state = State(0, len(groups), data=dict(data or {}))
    for g, group in enumerate(groups):
        seeds = [replace(params, seed=text_seed(experiment.seed, 0, g * batch + i)) for i in range(len(group))]
        left = any((arm.name, g, 0) not in known for arm in arms)
        calls = along.calls(along.draw(group, g * batch)) if along and left else {}
        for place, arm in enumerate(order.sample(arms, len(arms))):
            if (arm.name, g, 0) in known:
                continue
            record = run_group(arm, group, seeds, (g, 0, place), *behind[g : g + 1])
            record = replace(record, replayed=calls.get(arm.name))
            if experiment.quality is not None:
                record = with_quality(target, group, record)
            store.append(run, record.key, asdict(record))
            known[record.key] = record
        found = analyse(experiment, [r for r in known.values() if r.group <= g], len(groups))
        state = replace(found, data=state.data)
        store.save_experiment(experiment.name, run, config, asdict(state))
        progress(state)
        if stop_early and state.decided:
            break
    check_answered(list(known.values()))
    store.finish(run, asdict(state))
    return state
