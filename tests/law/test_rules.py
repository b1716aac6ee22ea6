"""EX-1 for every lossless rule: by enumeration, its output has the target's distribution and its ledger holds.

One table: rule, enumerator of its coins, cases. Nothing is sampled, so nothing but rounding is tolerated (1e-12). An eighth of
the cases in `make test`, all in `make test-slow`. What is particular to one rule stands in its own file.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from outrider.options import EXACT_RULES, LOSSY_RULES
from outrider.verify import LOSSLESS, RULES, SpeculativeSampling
from tests.law import test_block_rule, test_kseq_rule, test_spechub_rule, test_transport_rule, test_traversal_rule
from tests.law.lab import SHARES, Enumerator, RuleFn, check_rule, some
from tests.law.worlds import Shape, chain, random_world, shapes

PAIR = (True, True)
AT_ONCE = 200
"""Most cases of one batch of probes, where shapes are many."""

CHAINS = [  # name, vocabulary, shape, support, cases
    ("one", 3, chain(1), None, 4000),
    ("two", 3, chain(2), None, 2000),
    ("three", 3, chain(3), None, 600),
    ("three, two tokens", 2, chain(3), None, 600),
    ("point masses", 3, chain(3, has_q=False), None, 600),
    ("some point masses", 3, Shape((-1, 0, 1), (True, False, True)), None, 300),
    ("support", 4, chain(2), np.array([2, 0, 3]), 200),
]
TREES = [  # name, vocabulary, shape, full support, cases
    *[
        (f"iid {name}", v, shape, False, n)
        for (name, shape), v, n in zip(shapes().items(), (3, 3, 2, 2), (400, 80, 60, 40), strict=True)
    ],
    *[
        (f"without replacement {name}", v, shape, full, n)
        for (name, shape), v, full, n in zip(
            shapes("without_replacement").items(),
            (3, 4, 3, 3),
            (False, True, True, False),
            (300, 30, 10, 10),
            strict=True,
        )
    ],
    ("points", 3, Shape((-1, -1, 0, 0, 1), (False,) * 5), False, 400),
    ("points, wide", 4, Shape((-1, -1, -1, -1, 2), (False,) * 5), False, 200),
    ("drawn or fixed", 3, Shape((-1, -1, -1, 0), (True, False, True, True)), False, 80),
    (
        "fixed or drawn without replacement",
        3,
        Shape((-1, -1, -1), (False, True, True), "without_replacement"),
        False,
        90,
    ),
]
BLOCK = [  # name, vocabulary, shape, support, cases
    ("one", 3, chain(1), None, 1000),
    ("two", 3, chain(2), None, 600),
    ("three", 3, chain(3), None, 200),
    ("four, two tokens", 2, chain(4), None, 300),
    ("point masses", 3, chain(3, has_q=False), None, 300),
    ("some point masses", 3, Shape((-1, 0, 1), (True, False, True)), None, 200),
    ("support", 4, chain(2), np.array([2, 0, 3]), 150),
]
KSEQ = [  # name, vocabulary, shape, cases
    ("two", 3, Shape((-1, -1), PAIR), 300),
    ("three", 3, Shape((-1, -1, -1), (True,) * 3), 80),
    ("four", 2, Shape((-1,) * 4, (True,) * 4), 60),
    ("two by two", 2, Shape((-1, -1, 0, 0, 1, 1), (True,) * 6), 40),
    ("chain", 3, chain(2), 60),
    ("points", 3, Shape((-1, -1, 0), (False,) * 3), 60),
    ("mixed", 3, Shape((-1, -1, -1, 0), (True, False, True, True)), 40),
    ("without replacement", 3, Shape((-1, -1), PAIR, "without_replacement"), 60),
]
HUB = [  # name, vocabulary, shape, cases
    ("pair of two", 2, Shape((-1, -1), PAIR, "hub"), 60),
    ("pair of three", 3, Shape((-1, -1), PAIR, "hub"), 200),
    ("pair of five", 5, Shape((-1, -1), PAIR, "hub"), 60),
    ("two by two", 3, Shape((-1, -1, 0, 0, 1, 1), (True,) * 6, "hub"), 20),
    ("points", 3, Shape((-1, -1, 0), (False,) * 3, "hub"), 40),
    ("iid pair", 3, Shape((-1, -1), PAIR), 40),
    ("chain", 3, chain(2), 40),
]
TRANSPORT = [  # name, vocabulary, shape, cases
    ("two", 3, Shape((-1, -1), PAIR), 120),
    ("two of five", 5, Shape((-1, -1), PAIR), 25),
    ("three", 3, Shape((-1, -1, -1), (True,) * 3), 30),
    ("four", 2, Shape((-1,) * 4, (True,) * 4), 60),
    ("two by two", 2, Shape((-1, -1, 0, 0, 1, 1), (True,) * 6), 40),
    ("chain", 3, chain(2), 60),
    ("points", 3, Shape((-1, -1, 0), (False,) * 3), 60),
    ("mixed", 3, Shape((-1, -1, -1, 0), (True, False, True, True)), 40),
    ("without replacement", 3, Shape((-1, -1), PAIR, "without_replacement"), 60),
]
TRAVERSAL = [  # name, vocabulary, shape, cases
    ("two", 3, Shape((-1, -1), PAIR), 200),
    ("three", 3, Shape((-1, -1, -1), (True,) * 3), 40),
    ("two by two", 2, Shape((-1, -1, 0, 0, 1, 1), (True,) * 6), 30),
    ("uneven", 3, Shape((-1, -1, 0, 2), (True,) * 4), 20),
    ("deep then wide", 2, Shape((-1, 0, 1, 1, 0), (True,) * 5), 40),
    ("points", 3, Shape((-1, -1, 0, 0), (False,) * 4), 60),
    ("mixed", 3, Shape((-1, -1, -1, 0), (True, False, True, True)), 20),
    ("without replacement", 3, Shape((-1, -1, 0, 0), (True,) * 4, "without_replacement"), 30),
    ("chain", 3, chain(2), 40),
    ("hub", 3, Shape((-1, -1, 0, 0), (True,) * 4, "hub"), 20),
]


class Subject(NamedTuple):
    """A rule, what enumerates its coins, the seed of its cases and that of the coins' places."""

    rule: RuleFn
    enumerator: type[Enumerator]
    seed: int
    coins: int = 1


class Case(NamedTuple):
    name: str
    vocab: int
    shape: Shape
    count: int
    support: np.ndarray | None = None
    full: bool = False


def with_support(table: list) -> list[Case]:
    return [Case(name, vocab, shape, count, support) for name, vocab, shape, support, count in table]


def as_needed(table: list) -> list[Case]:
    """Siblings without replacement never run out of tokens."""
    return [Case(n, vocab, s, count, None, s.siblings == "without_replacement") for n, vocab, s, count in table]


SUBJECTS = {
    "chains": (Subject(SpeculativeSampling(), Enumerator, 11), with_support(CHAINS)),
    "trees": (
        Subject(SpeculativeSampling(), Enumerator, 12, 2),
        [Case(name, vocab, shape, count, None, full) for name, vocab, shape, full, count in TREES],
    ),
    "block": (Subject(test_block_rule.RULE, test_block_rule.BlockEnumerator, 21), with_support(BLOCK)),
    "k-seq": (Subject(test_kseq_rule.RULE, test_kseq_rule.KSeqEnumerator, 31), as_needed(KSEQ)),
    "transport": (Subject(test_transport_rule.RULE, test_transport_rule.TransportEnumerator, 41), as_needed(TRANSPORT)),
    "traversal": (Subject(test_traversal_rule.RULE, test_traversal_rule.TraversalEnumerator, 61), as_needed(TRAVERSAL)),
    "spechub": (
        Subject(test_spechub_rule.RULE, test_spechub_rule.HubEnumerator, 71),
        [Case(name, vocab, shape, count, None, True) for name, vocab, shape, count in HUB],
    ),
}
TABLE = [
    pytest.param(subject, case, id=f"{name}: {case.name}")
    for name, (subject, cases) in SUBJECTS.items()
    for case in cases
]


@SHARES
@pytest.mark.parametrize(("subject", "case"), TABLE)
def test_the_output_has_the_targets_distribution(subject: Subject, case: Case, share: float) -> None:
    rng, count = np.random.default_rng([subject.seed, len(case.name), case.vocab]), some(case.count, share)
    for _ in range(0, count, AT_ONCE):
        size = min(count, AT_ONCE)
        worlds = [random_world(rng, case.vocab, case.shape, case.support, case.full) for _ in range(size)]
        check_rule(subject.rule, subject.enumerator, worlds, subject.coins)


def test_there_are_ten_thousand_cases_of_speculative_sampling() -> None:
    assert sum(case[-1] for case in CHAINS) + sum(case[-1] for case in TREES) == 10_000


def test_every_lossless_rule_but_match_has_a_row() -> None:
    """Match draws no coins of its own: its races are in `test_match_rule.py`."""
    assert {subject.rule.name for subject, _ in SUBJECTS.values()} == set(LOSSLESS) - {"match"}


def test_the_names_that_options_know_are_those_of_the_table() -> None:
    """They are known without PyTorch, so that a mistyped one is said at once."""
    assert set(LOSSLESS) == set(EXACT_RULES) and set(RULES) == {*EXACT_RULES, *LOSSY_RULES}
