"""The contracts of a drafter, tried on a small target: interface, shapes, distributions, evidence, memory, batch and text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product

import numpy as np

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.engine import contracts
from outrider.models.toy import TableTarget
from outrider.params import SamplingParams
from outrider.protocols import Drafter, Target
from outrider.testing.report import BrokenContract, Report, unlikely
from outrider.testing.watched import Watched
from outrider.verify import best_exact

SMALL, SAMPLES, TOGETHER = 5, 1000, 50
"""Vocabulary, texts and slots of the test of the joint distribution of the first three tokens."""
PROMPTS: tuple[tuple[int, ...], ...] = ((1, 2, 3, 1, 2), (4,), (0, 1) * 9, (2, 2, 2))
TOKENS = 24


def check_drafter(make: Callable[[], Drafter], target: Target | None = None, *, length: int = 4) -> Report:
    """Try a drafter against its contracts (docs/step.md).

    make: makes a new drafter, as its class does or a lambda: some contracts compare a new one with a used one.
    target: for a drafter that needs a certain model (it reads hidden states, or has a vocabulary); None: a table of random
    distributions, on which the distribution of the text is tested too. length: draft length asked for.
    Returns what held; raises BrokenContract, one sentence, for the first contract that does not: which class, which contract, what
    was seen, what to do. Statistical checks complain of a good drafter with a probability of one in a billion each.
    """
    where = target or TableTarget.random(16, seed=1, sharp=2.0)
    name = type(make()).__name__
    contracts.check("drafter", make(), contracts.DRAFTER)
    checked = ["its attributes and methods are those of outrider.protocols.Drafter"]

    def run(slots: int, which: Iterable[int] = range(len(PROMPTS)), times: int = 1) -> Watched:
        watched = Watched(make(), where.vocab_size)
        engine = _engine(where, watched, slots, length, chunk=7)
        for _ in range(times):
            texts.append(_texts(engine, {i: [t % where.vocab_size for t in PROMPTS[i]] for i in which}))
            _raise(name, watched.found)
            seen.append(list(watched.drafts))
            watched.drafts.clear()
        return watched

    texts: list[list[tuple[int, ...]]] = []
    seen: list[list] = []
    first = run(3, times=2)
    checked += [
        "it returns a draft of the right shape for every step, and raises nothing",
        "it changes nothing of the evidence",
        "each q sums to one, and no drafted token has probability 0 under it",
    ]
    if seen[0] != seen[1]:
        _raise(
            name,
            "drafted differently when its slots were used a second time with the same texts and seeds: what release(slots) does "
            "not "
            "clear, or a draw that is not from the noise of the evidence, is still there",
        )
    run(3)
    if seen[2] != seen[0]:
        _raise(
            name,
            "drafted differently than another new one of its kind on the same evidence: draw with evidence.noise alone",
        )
    checked.append("its drafts are a function of the evidence since a slot was released, and of the noise")
    alone: list[tuple[int, ...]] = []
    for i in range(len(PROMPTS)):
        run(1, (i,))
        alone += texts[-1]
    if alone != texts[0]:
        _raise(
            name, "changed a text by what ran beside it: keep its state by slot (view.slot), not by place in the batch"
        )
    checked.append("texts do not depend on what runs beside them")
    _raise(name, first.not_drawn())
    checked.append("tokens are drawn from the q that is given for them")
    if target is None:
        _raise(name, _joint(make, length))
        return Report(first.name, (*checked, "the text has the target's distribution"))
    return Report(first.name, tuple(checked), ("the distribution of the text: it is tested on our own target only",))


def _raise(name: str, found: str) -> None:
    if found:
        raise BrokenContract(f"the drafter {name} {found}")


def _engine(target: Target, drafter: Drafter, slots: int, length: int, chunk: int = 256) -> Engine:
    longest = min(length, drafter.max_depth)
    return Engine(target, drafter, best_exact(drafter), Fixed(longest), slots=slots, chunk=chunk, max_length=256)


def _texts(engine: Engine, prompts: dict[int, list[int]]) -> list[tuple[int, ...]]:
    """Texts of prompts, each with its number as seed."""
    wanted = [SamplingParams(seed=i, max_tokens=TOKENS, ignore_eos=True) for i in prompts]
    return [r.outputs[0].token_ids for r in engine.generate(prompts.values(), wanted, progress=lambda _: None)]


def _joint(make: Callable[[], Drafter], length: int) -> str:
    """Chi-square of the first three tokens of many texts against the target's own distribution."""
    table = TableTarget.random(SMALL, seed=2, sharp=1.0)
    watched = Watched(make(), SMALL)
    engine = _engine(table, watched, TOGETHER, length)
    counts = np.zeros((SMALL,) * 3)
    prompt = [1, 2, 1, 3, 1, 2, 1]
    params = [SamplingParams(seed=7919 * i, max_tokens=3, ignore_eos=True) for i in range(SAMPLES)]
    for result in engine.generate([prompt] * SAMPLES, params, progress=lambda _: None):
        counts[result.outputs[0].token_ids] += 1
    if watched.found:
        return watched.found
    rows = [table.distribution([*prompt, t]).numpy() for t in range(SMALL)]
    start, expected = table.distribution(prompt).numpy(), np.zeros((SMALL,) * 3)
    for a, b, c in product(range(SMALL), repeat=3):
        expected[a, b, c] = SAMPLES * start[a] * rows[a][b] * rows[b][c]
    value = unlikely(counts.ravel(), expected.ravel())
    if value is None:
        return watched.not_drawn()
    return (
        f"changed the distribution of the text (chi-square {value:.0f} over {SMALL**3} cells of three tokens): each node must "
        "be drawn "
        "from its own q, and none dropped or added after a token was seen; q=None is always lossless"
    )
