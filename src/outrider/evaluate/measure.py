"""Measure arms against each other: interleaved on the same prompts and seeds, warm-up apart, raw records only."""

from __future__ import annotations

import logging
import platform
import random
import resource
import sys
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from time import perf_counter
from typing import Any, TypeVar

from outrider.build import Engine
from outrider.engine.prompts import Prompts
from outrider.engine.sequence import Event
from outrider.errors import ConfigError, RequestError
from outrider.evaluate.energy import Meter
from outrider.evaluate.records import Key, Record, Timing
from outrider.moved import names_of
from outrider.noise import derive_seed
from outrider.params import SamplingParams

logger = logging.getLogger(__name__)
Thing = TypeVar("Thing")
Later = Callable[[Seq[Seq[int]]], list[int] | None]
"""What is asked behind replies (token ids), such as `workloads.Asked`: the next prompt; None behind the last."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One configuration under test."""

    name: str
    engine: Engine


@dataclass(slots=True)
class _Turn:
    """A request of a group while it is decoded. place: (number of its prompt, of its turn). begun: seconds of the group's clock."""

    place: tuple[int, int]
    prompt: list[int]
    begun: float
    steps: int
    tokens: dict[int, list[int]] = field(default_factory=dict)
    first: dict[int, float] = field(default_factory=dict)
    ended: dict[int, tuple[float, int]] = field(default_factory=dict)

    def timings(self) -> list[Timing]:
        """Of its texts, of those that have tokens."""
        out = []
        for index, tokens in self.tokens.items():
            if tokens:
                end, steps = self.ended[index]
                out.append(Timing(self.first[index] - self.begun, end - self.begun, len(tokens), steps - self.steps))
        return out


class _Group:
    """The requests of a group, and what is asked behind their replies. Its clock stands while a next prompt is written: that is no
    decoding. failed: requests that ended with an error or were refused. shortened: see `Record`."""

    def __init__(self, engine: Engine, params: Seq[SamplingParams], later: Seq[Later | None]) -> None:
        self._engine, self._params, self._later = engine, params, later
        self.turns: dict[str, _Turn] = {}
        self.failed = self.shortened = 0
        self._start, self._away = perf_counter(), 0.0

    @property
    def now(self) -> float:
        """Seconds since the group began, without those in which prompts were written."""
        return perf_counter() - self._start - self._away

    def ask(self, number: int, prompt: list[int], turn: int = 0) -> None:
        """Submit the prompt of a turn. One that the engine refuses has an empty text."""
        name = f"measured-{number}-{turn}"
        params = self._params[number]
        if turn and params.seed is not None:
            params = replace(params, seed=derive_seed(params.seed, turn) >> 1)
        begun = self.now if turn else 0.0
        self.turns[name] = _Turn((number, turn), prompt, begun, self._engine.counts.steps)
        try:
            self._engine.submit(prompt, params, request=name)
        except RequestError:
            self.failed += 1
            self.turns[name].tokens[0] = []

    def take(self, events: Seq[Event]) -> None:
        """What a step has brought; a reply that has ended may be followed by a next turn."""
        now, steps = self.now, self._engine.counts.steps
        for e in events:
            turn = self.turns[e.request]
            turn.tokens.setdefault(e.index, []).extend(e.tokens)
            turn.first.setdefault(e.index, now)
            turn.ended[e.index] = (now, steps)
            self.failed += e.finish_reason == "error"
        for e in events:
            if e.finish_reason not in (None, "error"):
                self._go_on(*self.turns[e.request].place)

    def _go_on(self, number: int, turn: int) -> None:
        later = self._later[number]
        if later is None:
            return
        start = perf_counter()
        replies = [self.turns[f"measured-{number}-{t}"].tokens[0] for t in range(turn + 1)]
        try:
            prompt, why = later(replies), ""
        except ConfigError as error:  # the template's: of what the model has replied
            prompt, why = None, str(error)
        self._away += perf_counter() - start
        if prompt is not None and len(prompt) >= self._engine.max_length:
            why = f"its {len(prompt)} tokens do not fit into a context of {self._engine.max_length}"
        if why:
            self.shortened += 1
            logger.warning("turn %d of conversation %d and all behind it are left out: %s", turn + 2, number + 1, why)
        elif prompt is not None:
            self.ask(number, prompt, turn + 1)


def run_group(
    arm: Arm,
    prompts: list[list[int]],
    params: list[SamplingParams],
    place: tuple[int, int, int],
    later: Seq[Later | None] = (),
) -> Record:
    """Decode one group of prompts together on one arm. A request that the engine refuses or fails is an outcome: `failed`.

    later: of each prompt, what is asked behind its replies; none: each is asked once.
    """
    engine = arm.engine
    engine.reset()
    before = _meter().read()
    group = _Group(engine, params, later or [None] * len(prompts))
    try:
        for i, prompt in enumerate(prompts):
            group.ask(i, prompt)
        while engine.busy:
            group.take(engine.step())
    finally:
        for name in group.turns:
            engine.abort(name)
    seconds, after = group.now, _meter().read()
    counts, phases = engine.reset()
    joules = after.joules_since(before) if after is not None and before is not None else None
    turns = sorted(group.turns.values(), key=lambda turn: turn.place)
    texts = [(turn.prompt, turn.tokens[index]) for turn in turns for index in sorted(turn.tokens)]
    return Record(
        arm.name,
        *place,
        tokens=sum(len(text) for _, text in texts),
        seconds=seconds,
        phases=phases,
        counts=counts,
        failed=group.failed,
        shortened=group.shortened,
        timings=tuple(t for turn in group.turns.values() for t in turn.timings()),
        loops=sum(ends_in_a_loop(text) for _, text in texts),
        outputs=tuple(tuple(text) for _, text in texts),
        joules=joules,
        machine=machine(),
        asked=tuple(tuple(prompt) for prompt, _ in texts) if any(later) else (),
    )


def ends_in_a_loop(tokens: Seq[int], *, longest: int = 32, times: int = 4, least: int = 32) -> bool:
    """Whether a text ends in at least `times` copies of one piece of at most `longest` tokens, over at least `least` tokens.

    A repetition is what drafts guess best: without this guard the fastest arm may be the broken one.
    """
    for period in range(1, longest + 1):
        span = max(least, times * period)
        if len(tokens) >= span and all(tokens[-i] == tokens[-i - period] for i in range(1, span - period + 1)):
            return True
    return False


def text_seed(seed: int, repeat: int, prompt: int) -> int:
    """Sampling seed of a prompt's text, >= 0: another run seed draws other texts, so that two runs are two samples."""
    return derive_seed(derive_seed(seed, repeat + 1), prompt + 1) >> 1


def grouped(things: Seq[Thing], batch: int) -> list[list[Thing]]:
    """In groups of `batch`, the last of what is left."""
    return [list(things[i : i + batch]) for i in range(0, len(things), batch)]


def run_arms(
    arms: list[Arm],
    prompts: Prompts,
    params: SamplingParams,
    *,
    batch: int = 1,
    repeats: int = 3,
    warmup: int = 1,
    seed: int = 0,
    later: Seq[Later | None] = (),
    progress: Callable[[str], None] | None = None,
    known: Mapping[Key, Record] | None = None,
    keep: Callable[[Record], Record] | None = None,
) -> list[Record]:
    """Run every arm on every group of `batch` prompts `repeats` times, the arms of a group next to each other in random order.

    seed: of the run: it decides the texts that are drawn (`text_seed`, the same in every arm) and the order of arms. Warm-up runs
    are thrown away. A failed request is kept as an outcome (`Record.failed`) and its record enters no rate. later: of each prompt,
    what is asked behind its replies; each arm goes on from its own. known: records of an interrupted run, which are not run again.
    keep: called with every new record outside of any measured time; what it returns takes the record's place.
    """
    if not arms:
        raise ConfigError("nothing is measured without an arm: name at least one")
    if not (texts := arms[0].engine.encode_all(prompts)):
        raise ConfigError("nothing is measured without a prompt: give at least one")
    groups, behind = grouped(texts, batch), grouped(later, batch)
    order, known = random.Random(seed), known or {}
    for arm in arms:
        if any((arm.name, g, r) not in known for g in range(len(groups)) for r in range(repeats)):
            for _ in range(warmup):
                run_group(arm, groups[0], [params] * len(groups[0]), (0, -1, 0), *behind[:1])
    records: list[Record] = []
    for repeat in range(repeats):
        for g, group in enumerate(groups):
            seeds = [replace(params, seed=text_seed(seed, repeat, g * batch + i)) for i in range(len(group))]
            for place, arm in enumerate(order.sample(arms, len(arms))):
                record = known.get((arm.name, g, repeat))
                if record is None:
                    record = run_group(arm, group, seeds, (g, repeat, place), *behind[g : g + 1])
                    record = keep(record) if keep else record
                records.append(record)
                if progress:
                    progress(arm.name)
    check_answered(records)
    return records


def check_answered(records: Seq[Record]) -> None:
    """Raise ConfigError if every request failed and none has a token: that is no failure of single ones."""
    if records and all(r.failed and not r.tokens for r in records):
        raise ConfigError(
            "no request was answered, so that nothing was measured: `outrider generate` with this target says why"
        )


@cache
def _meter() -> Meter:
    return Meter()


def energy_absent() -> str | None:
    """Why there is no energy in the records; None where there is."""
    return None if _meter().present else _meter().absent


def peak_memory() -> int:
    """Most resident memory of this process so far, in bytes: weights and caches of all its engines together."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@cache
def machine() -> dict[str, Any]:
    """What a reader needs to know about where numbers were taken."""
    import torch

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            model = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), model)
    except OSError:
        pass
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("torch", "transformers", "outrider")},
    }


__getattr__ = names_of(__name__)
