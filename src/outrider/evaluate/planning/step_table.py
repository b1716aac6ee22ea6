"""Seconds of a step by load, draft length and prompt rows, measured on the real engine; what a simulated fleet runs on.

Every configuration (drafter, length, sequences) decodes prompts of the set in short, interleaved runs, and each step's record is
kept. A step without prompt rows gives the time at its load; loads in between are read off a straight line. Prompt rows add time of
their own, taken from the steps that had some: minus what their decoding sequences alone would have taken, by rows.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np

from outrider.build import Engine, assemble
from outrider.engine.prompts import Prompts
from outrider.errors import ConfigError
from outrider.params import SamplingParams
from outrider.records import Counts, StepRecord
from outrider.theory.fleet import Replica

LEAST = 3
"""Steps of a kind that a median is taken of."""


@dataclass(slots=True)
class StepTable:
    """decode[length][sequences]: seconds of a step without prompt rows.

    prompts[drafting]: [(rows, seconds that they add)], rising; with drafts the drafter reads them too. counts[length]: what the
    runs counted, for acceptance. spread: ratios of single steps to the table's entry.
    """

    decode: dict[int, dict[int, float]]
    prompts: dict[bool, list[tuple[float, float]]]
    counts: dict[int, Counts] = field(default_factory=dict)
    spread: list[float] = field(default_factory=list)

    def seconds(self, decoding: int, length: int, rows: int) -> float:
        """Predicted seconds of a step of `decoding` sequences with drafts of `length`, and `rows` prompt rows besides."""
        added = self._along(self.prompts[length > 0], rows) if rows else 0.0
        if not decoding:
            return added
        return self._along(sorted(self.decode[length].items()), decoding) + added

    def served(self, step: float, sequence: float = 0.0) -> StepTable:
        """The table of a server. step, sequence: seconds (>= 0) of text and HTTP in a step that decodes, and for each of its
        sequences."""
        longer = {n: {b: s + step + sequence * b for b, s in row.items()} for n, row in self.decode.items()}
        return replace(self, decode=longer)

    @staticmethod
    def _along(points: Sequence[tuple[float, float]], at: float) -> float:
        """On straight lines through the points; below the first its value, beyond the last along the last line."""
        xs, ys = (np.array(v, float) for v in zip(*points, strict=True))
        if at <= xs[0]:
            return float(ys[0])
        if at >= xs[-1] and len(xs) > 1:
            return float(ys[-1] + max(0.0, (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])) * (at - xs[-1]))
        return float(np.interp(at, xs, ys))

    def acceptance(self, longest: int) -> tuple[float, ...]:
        """[longest] probability that the draft token at each depth is accepted when those before it were: all lengths together."""
        total = Counts()
        for length, c in self.counts.items():
            if length:
                total.merge(c)
        judged, accepted = total.judged_at, total.accepted_at
        out: list[float] = []
        for d in range(longest):
            known = d < len(judged) and judged[d] >= LEAST
            out.append(accepted[d] / judged[d] if known else out[-1] if out else 0.0)
        return tuple(out)

    def best_lengths(self, slots: int) -> list[int]:
        """[slots + 1] the length of the most tokens per second at each load, the shorter of equals."""
        accepted = np.cumprod([1.0, *self.acceptance(max(self.decode))])
        tokens = np.cumsum(accepted)
        out = [0]
        for b in range(1, slots + 1):
            out.append(min(self.decode, key=lambda n: (-tokens[n] / self.seconds(b, n, 0), n)))
        return out

    def replica(self, slots: int, speculate: bool, chunk: int = 256, overhead: float = 0.0) -> Replica:
        """A server that is made of this machine and pair. speculate: with the best length for each load, else plain decoding."""
        longest = max(self.decode)
        lengths = self.best_lengths(slots) if speculate else [0]
        jitter = tuple(self.spread)
        return Replica(self.seconds, slots, lengths, self.acceptance(longest), chunk, jitter, overhead)


Step = tuple[int, int, int, float]
"""Of one step: draft length, decoding sequences, prompt rows, seconds."""


def measure(
    engine: Engine, prompts: Prompts, draft: str, lengths: Sequence[int], loads: Sequence[int], params: SamplingParams,
    *, rounds: int = 3, seed: int = 0, progress: Callable[[float], None] = lambda _: None,
) -> StepTable:  # fmt: skip
    """The table of one drafter, from `rounds` runs of each length and load; the first round warms up and is thrown away.

    The runs of a round come in random order. Raises ConfigError if a load or length gave too few steps.
    """
    texts, rng = engine.encode_all(prompts), random.Random(seed)
    cells = [(n, b) for n in sorted({0, *lengths}) for b in sorted(set(loads))]
    steps: list[Step] = []
    counts: dict[int, Counts] = defaultdict(Counts)
    records: list[StepRecord] = []
    engines = {n: _engine(engine, draft if n else "none", n, max(loads), records) for n, _ in cells}
    for turn in range(-1, rounds):
        for done, (n, b) in enumerate(rng.sample(cells, len(cells))):
            first = rng.randrange(len(texts))
            group = [texts[(first + i) % len(texts)] for i in range(b)]
            own = [replace(params, seed=rng.randrange(2**31)) for _ in group]
            seen = run(engines[n], group, own, records)
            if turn >= 0:
                steps += [(n, *s) for s in seen[0]]
                counts[n].merge(seen[1])
            progress(((turn + 1) * len(cells) + done + 1) / ((rounds + 1) * len(cells)))
    return build_table(steps, counts)


def _engine(engine: Engine, draft: str, length: int, slots: int, records: list[StepRecord]) -> Engine:
    """An engine on the same target that appends the record of every step to `records`."""
    if engine.loaded is None:
        raise ConfigError("this engine was built from part objects: a step table needs one that was loaded")
    options = engine.loaded.options.changed(draft=draft, length=length, slots=slots)
    return assemble(replace(engine.loaded, sinks=(records.append,)), options)


def run(
    engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams], records: list[StepRecord]
) -> tuple[list[tuple[int, int, float]], Counts]:
    """Decode a group: [(decoding sequences, prompt rows, seconds)] of its steps, and their sums."""
    engine.reset()
    for prompt, p in zip(prompts, params, strict=True):
        engine.submit(prompt, p)
    steps: list[tuple[int, int, float]] = []
    while engine.busy:
        decoding = sum(len(s.tokens) - s.cached == 1 for s in engine.scheduler.running)
        records.clear()
        start = perf_counter()
        engine.step()
        seconds = perf_counter() - start
        if records:
            steps.append((decoding, max(0, records[-1].rows - decoding - records[-1].counts.proposed), seconds))
    return steps, engine.reset()[0]


def build_table(steps: Sequence[Step], counts: Mapping[int, Counts]) -> StepTable:
    """The table from the steps of runs. Raises ConfigError if there were too few."""
    alone: dict[tuple[int, int], list[float]] = defaultdict(list)
    for n, b, rows, seconds in steps:
        if not rows:
            alone[n, b].append(seconds)
    decode: dict[int, dict[int, float]] = defaultdict(dict)
    for (n, b), found in alone.items():
        if len(found) >= LEAST:
            decode[n][b] = _middle(found)
    if 0 not in decode or any(n not in decode for n, *_ in steps):
        raise ConfigError("too few steps to make a table of: raise --rounds or --max-tokens")
    for n, row in decode.items():
        decode[n] = {int(b): s for b, s in _rising([(b, s, len(alone[n, b])) for b, s in sorted(row.items())])}
    table = StepTable(dict(decode), {}, dict(counts))
    table.spread = [s / table.seconds(b, n, 0) for n, b, rows, s in steps if not rows and b in decode[n]]
    for drafting in {n > 0 for n in decode}:
        added: dict[int, list[float]] = defaultdict(list)
        for n, b, rows, seconds in steps:
            if rows and (n > 0) == drafting:
                added[rows].append(max(1e-6, seconds - table.seconds(b, n, 0)) if b else seconds)
        if not added:
            raise ConfigError("no step read a prompt: give prompts of more than one token")
        table.prompts[drafting] = _rising([(rows, _middle(found), len(found)) for rows, found in sorted(added.items())])
    mean = float(np.mean(table.spread))
    table.spread = [x / mean for x in table.spread]
    return table


def _middle(seconds: Sequence[float]) -> float:
    """The mean without the slowest twentieth, which are the machine's and not the step's."""
    kept = np.sort(np.asarray(seconds))[: max(1, int(np.ceil(0.95 * len(seconds))))]
    return float(kept.mean())


def _rising(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float]]:
    """The nearest sequence that does not fall, weighted by how many steps each point has: more rows cannot take less time."""
    from scipy.optimize import isotonic_regression

    rows, seconds, weights = zip(*points, strict=True)
    risen = isotonic_regression(seconds, weights=weights).x
    return [(float(r), float(s)) for r, s in zip(rows, risen, strict=True)]
