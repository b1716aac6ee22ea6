"""Expected tokens a second of a checkpoint on this machine, from about two seconds with a part of it.

As many of its first blocks as take `PART` bytes are loaded as they would run, and forwards of one to `ROWS[-1]` rows are timed:
what memory and products allow for the types that the file has, by the kernels that will be used. The rest of the blocks costs as
much a byte. Rows are of random tokens, which choose experts more independently than those of a text do, so a mixture's rows cost
that at most. What a step costs beside forwards is that of an engine on the same part. Acceptance belongs to a draft and a text, so
speeds with drafts are told for several.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.none import NoDraft
from outrider.errors import CapacityError
from outrider.models.lean import LeanTarget
from outrider.models.load import first_blocks
from outrider.models.reading import Progress
from outrider.params import SamplingParams
from outrider.theory.speedup import tokens_per_call
from outrider.types import Draft, Rows
from outrider.verify import load_rule

PART = 192 << 20
"""Bytes of blocks that are loaded: more than most caches hold, and read in a tenth of a second or so."""
ROWS: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
CACHED, LEAST_CONTEXT = 128, 48
"""Tokens before the rows, in a longer context than that; contexts that are long enough for anything."""
SECONDS = 0.5
"""For each of the measurements: forwards of a model, steps of an engine."""
LENGTHS: tuple[int, ...] = (1, 3, 5)
ACCEPTANCES = (0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of a whole model's forward of so many rows of one sequence, and of the part's of which they were measured."""

    whole: dict[int, float]
    part: dict[int, float]

    def more(self, rows: int) -> float:
        """What the whole takes longer than the part, for a number of rows between those that were measured."""
        below, above = max(n for n in ROWS if n <= rows), min(n for n in ROWS if n >= rows)
        low, high = (self.whole[n] - self.part[n] for n in (below, above))
        return low if above == below else low + (high - low) * (rows - below) / (above - below)

    @property
    def disturbed(self) -> bool:
        """Whether several rows took less than nine tenths of the time of one, which is in them: others had the cores."""
        return min(self.whole.values()) < 0.9 * self.whole[1]


@dataclass(frozen=True, slots=True)
class Pace:
    """tokens: a second, plain. times: of the target. drafted: by acceptance the tokens a second and the draft length of the best of
    `LENGTHS`; empty without a draft. touched: by rows the experts of a layer that they touch; empty for a dense target. unmeasured:
    why a draft was not measured; empty if it was, or if there is none."""

    tokens: float
    times: Times
    drafted: dict[float, tuple[float, int]]
    touched: dict[int, float]
    unmeasured: str = ""


def pace(
    target: str | Path, draft: str | Path | None, dtype: str = "auto", progress: Progress | None = None
) -> Pace | str:
    """The speeds, or a sentence on why they are not told. Takes some seconds. Raises ConfigError as loading does."""
    told = progress or (lambda _: None)
    if torch.cuda.is_available():
        return "it would run on the GPU, and what is measured here is the processor: measure with `outrider bench`"
    try:
        found = first_blocks(target, PART, dtype=dtype)
        if isinstance(found, str):
            return found
        model, share = found
        if model.max_length < LEAST_CONTEXT:
            return f"its context of {model.max_length} tokens is too short to measure"
        with torch.inference_mode():
            told(0.1)
            times, touched = timed(model, share)
            told(0.3)
            plain = step_seconds(model, None, 0) + times.more(1)
            if draft is None:
                return Pace(1.0 / plain, times, {}, touched)
            told(0.5)
            small = first_blocks(draft, PART, dtype=dtype)
            if isinstance(small, str):
                return Pace(1.0 / plain, times, {}, touched, small)
            if small[0].max_length < LEAST_CONTEXT:
                short = f"its context of {small[0].max_length} tokens is too short to measure"
                return Pace(1.0 / plain, times, {}, touched, short)
            cheap, part = small
            own, _ = timed(cheap, part)
            steps = {n: step_seconds(model, cheap, n) + times.more(n + 1) + n * own.more(1) for n in LENGTHS}
    except CapacityError as error:
        return str(error)
    best = {a: max((tokens_per_call(a, n) / spent, n) for n, spent in steps.items()) for a in ACCEPTANCES}
    return Pace(1.0 / plain, times, best, touched)


def timed(model: LeanTarget, share: Callable[[int], float]) -> tuple[Times, dict[int, float]]:
    """Forwards in random order, the least of each, since what neighbours do only adds to them; and the experts of a layer that they
    touch. share: of the whole's bytes in `model`, by rows."""
    cached = min(CACHED, model.max_length - ROWS[-1])
    kv, draw = model.new_kv(1, cached + ROWS[-1]), random.Random(0)
    some = lambda n: [draw.randrange(model.vocab_size) for _ in range(n)]  # noqa: E731
    text = Rows.assemble([0], [some(cached)], [0], Draft.empty(1))
    model.forward(text, kv)
    kv.commit(text, [()])
    asked = {n: Rows.assemble([0], [some(1)], [cached], _chain(some(n - 1))) for n in ROWS}
    least, touched, e = dict.fromkeys(ROWS, float("inf")), {}, model.config.experts
    for n in _until(list(ROWS), SECONDS):
        least[n] = min(least[n], _seconds(lambda n=n: model.forward(asked[n], kv)))
        if e is not None and model.native is not None and any(e.sparse):
            touched[n] = sum(model.native.touched) / sum(e.sparse)
    return Times({n: spent / share(n) for n, spent in least.items()}, least), dict(sorted(touched.items()))


def _chain(tokens: list[int]) -> Draft:
    """A draft of these tokens, which are all scored."""
    return Draft(torch.tensor(tokens, dtype=torch.int64), tuple(range(-1, len(tokens) - 1)), (len(tokens),))


def step_seconds(model: LeanTarget, draft: LeanTarget | None, length: int) -> float:
    """A decoding step of an engine of one sequence: the least of several short texts' time over their steps."""
    drafter = NoDraft() if draft is None else ModelDrafter(draft, length, vocab_size=model.vocab_size)
    engine = Engine(model, drafter, load_rule("block" if length else "speculative_sampling"), Fixed(length), slots=1,
                    max_length=min(model.max_length, CACHED))  # fmt: skip
    asked = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    least = float("inf")
    for _ in _until([0], SECONDS / (len(LENGTHS) if length else 1)):
        before = engine.counts.steps
        spent = _seconds(lambda: engine.generate([[1, 2, 3, 4]], asked))
        least = min(least, spent / (engine.counts.steps - before + 1))  # the prompt's forward counts as one
    return least


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _until(names: list[int], seconds: float) -> Iterator[int]:
    """All names in random order, twice at least, and again until the time is up."""
    end, order, rounds = time.perf_counter() + seconds, random.Random(0), 0
    while rounds < 2 or time.perf_counter() < end:
        yield from order.sample(names, len(names))
        rounds += 1
