"""Every drafter, with every rule, in every batch, gives the text of plain decoding (contracts 1-4, 6, 7).

Strings are compared, not distributions: at temperature 0 for every lossless rule, at every temperature for `match`, whose
noise depends on the position alone. A new drafter is a row of `drafters.DRAFTERS`, a new rule a row of `verify.RULES`.

`make test` runs a covering set: every drafter with every kind of parameters and capacity, every lossless rule with every way to
draft, and every rule with each set of parameters and capacity; the whole product runs in `make test-slow`.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from itertools import product

import pytest

from outrider.control.fixed import Fixed
from outrider.drafters.none import NoDraft
from outrider.engine.contracts import check_parts
from outrider.errors import CapabilityError
from outrider.verify import LOSSLESS, RULES, load_rule
from tests.contract.asked import PROMPTS, SAMPLING, engine, params, target, tokens
from tests.contract.drafters import DRAFTERS
from tests.covering import Combination, covering, slow_beyond

GREEDY = [name for name, p in SAMPLING.items() if p["temperature"] == 0]
MODEL = target()


@cache
def plain(sampling: str, rule: str) -> list[tuple[int, ...]]:
    """One request at a time, nothing proposed: the reference."""
    out = []
    for prompt, p in zip(PROMPTS, params(sampling), strict=True):
        out += tokens(engine(MODEL, NoDraft(), load_rule(rule), 1).generate([prompt], [p]))
    return out


def refused(drafter: str, rule: str) -> bool:
    """A tree drafter with a rule for chains, and a drafter of keyed noise with a rule that looks below the node it judges, are
    refused when the engine is built, in a sentence; True if it was."""
    proposes, judge = DRAFTERS[drafter](MODEL, 1), load_rule(rule)
    branches = proposes.trees and not judge.trees
    if not branches and not (getattr(proposes, "keyed", False) and getattr(judge, "reads_below", False)):
        return False
    assert not surely(drafter, rule), "what is refused shows nothing: the table must not count on it"
    with pytest.raises(CapabilityError, match="verifies chains only" if branches else "noise keyed by absolute place"):
        engine(MODEL, proposes, judge, 1)
    return True


CAPACITIES = (1, 3, 6)


def alone(combination: Combination) -> float:
    """What a combination costs: one sequence at a time takes twice the time of six."""
    return -combination[-1]


TREES = {name for name in RULES if load_rule(name).trees}
"""Rules that judge trees, and so every drafter; chains alone are judged by the others, and so `CHAIN`, but not every drafter."""
CHAIN = "model"

WAYS = ("coupled", "stop", "by-gain", "dynamic", "snap", "compiled", "tree", "batch", "shared", "jacobi", "ngram")
"""Ways to draft that tell drafts apart for the rule that judges them, each by a part of the names of drafters."""


def way(drafter: str) -> str:
    """What of a drafter a rule can tell: the first of `WAYS` in its name, or that of a learned or a simple one."""
    simple = drafter in ("none", "suffix", "recycle", "model-padded", "dflash-greedy")
    return next((w for w in WAYS if w in drafter), "known tokens" if simple else "drawn chain")


MATCHED = list(product(DRAFTERS, SAMPLING, CAPACITIES))
KINDS = {
    "greedy": "most likely",
    "greedy with penalties": "most likely",
    "temperature 1": "by its tokens",
    "cold, top-k": "by its tokens",
    "top-p with penalties": "by what was emitted",
    "min-p, bias, repetition": "by what was emitted",
    "bans and minimum": "by what was emitted",
}
"""What a distribution depends on: every drafter meets both kinds alone or in company, every way to draft every set of parameters at
every capacity."""


def matched(combination: tuple[str, str, int]) -> set[Hashable]:
    """What a combination shows; that drafters draft for the most likely token is shown by the lossless rules below."""
    drafter, sampling, capacity = combination
    shows: set[Hashable] = {
        (drafter, capacity > 1),
        (way(drafter), capacity),
        (way(drafter), sampling),
        (sampling, capacity),
    }
    return shows | ({(drafter, KINDS[sampling])} if sampling not in GREEDY else set())


@pytest.mark.parametrize(("drafter", "sampling", "capacity"), slow_beyond(MATCHED, covering(MATCHED, matched, alone)))
def test_match_equals_plain_decoding(drafter: str, sampling: str, capacity: int) -> None:
    one = engine(MODEL, DRAFTERS[drafter](MODEL, capacity), load_rule("match"), capacity)
    assert tokens(one.generate(PROMPTS, params(sampling))) == plain(sampling, "match")


CHAINS = (
    *(CHAIN, "model-coupled", "model-stop", "suffix", "suffix-shared"),
    *("ngram", "jacobi-fresh", "sparse-snap", "medusa-compiled"),
)
"""Drafters that no rule refuses: for each way to draft that has chains, one."""
BELOW = {name for name in RULES if getattr(load_rule(name), "reads_below", False)}


def surely(drafter: str, rule: str) -> bool:
    """Whether a combination is surely not `refused`, which making the drafter would tell, after its training."""
    return drafter in CHAINS or (rule in TREES and not (way(drafter) == "jacobi" and rule in BELOW))


def greedy(combination: tuple[str, str, str, int]) -> set[Hashable]:
    """What a combination shows; `match` was met above, in the same way. One that may be refused shows nothing."""
    drafter, rule, *how = combination
    if rule == "match" or not surely(drafter, rule):
        return set()
    shows: set[Hashable] = {(way(drafter), rule)}
    if rule in TREES or drafter == CHAIN:
        shows |= {(rule, x) for x in how} | {tuple(how)} | ({(drafter, how[0])} if rule in TREES else set())
    return shows


JUDGED = list(product(DRAFTERS, LOSSLESS, GREEDY, CAPACITIES))


@pytest.mark.parametrize(
    ("drafter", "rule", "sampling", "capacity"), slow_beyond(JUDGED, covering(JUDGED, greedy, alone))
)
def test_greedy_equals_plain_decoding(drafter: str, rule: str, sampling: str, capacity: int) -> None:
    if refused(drafter, rule):
        return
    one = engine(MODEL, DRAFTERS[drafter](MODEL, capacity), load_rule(rule), capacity)
    assert tokens(one.generate(PROMPTS, params(sampling))) == plain(sampling, "match")


EVERY = ("speculative_sampling", "match")
"""Rules that meet every set of sampling parameters; the others share their distributions and meet two of them."""
PAIRS = [
    (rule, name)
    for rule in RULES
    for name in (SAMPLING if rule in EVERY else ("temperature 1", "top-p with penalties"))
]


def company(combination: tuple[str, str, str]) -> set[Hashable]:
    """What a combination shows: every drafter, every way to draft with a lossless and with a lossy rule, every rule with its
    parameters. `match` is met above: no company matters to it."""
    drafter, rule, sampling = combination
    kind = "lossless" if rule in LOSSLESS else "lossy"
    shows: set[Hashable] = {drafter, (way(drafter), kind)} if rule != "match" and surely(drafter, rule) else set()
    return shows | {(rule, sampling)} if rule in TREES or drafter == CHAIN else shows


COMPARED = (1, 4, 5)
"""Of the six in company: one fed in chunks, and the two that join when others leave."""
TOGETHER = [(drafter, *pair) for drafter in DRAFTERS for pair in PAIRS]


@pytest.mark.parametrize(("drafter", "rule", "sampling"), slow_beyond(TOGETHER, covering(TOGETHER, company)))
def test_the_batch_is_invisible(drafter: str, rule: str, sampling: str) -> None:
    """Same drafter and seed: the same tokens alone and in company, whatever the slot, for sampled text too; lossy rules as well."""
    if refused(drafter, rule):
        return
    asked = params(sampling)
    together = tokens(engine(MODEL, DRAFTERS[drafter](MODEL, 4), load_rule(rule), 4).generate(PROMPTS, asked))
    for i in COMPARED:
        alone = engine(MODEL, DRAFTERS[drafter](MODEL, 1), load_rule(rule), 1).generate([PROMPTS[i]], [asked[i]])
        assert tokens(alone) == [together[i]]


def test_the_parts_that_an_engine_is_built_of_have_the_right_shape() -> None:
    for drafter in DRAFTERS.values():
        check_parts(MODEL, drafter(MODEL, 1), load_rule("match"), Fixed(2))


@pytest.mark.parametrize(("drafter", "rule"), [("tree-iid", "block"), ("jacobi-up", "block"), ("jacobi", "traversal")])
def test_what_does_not_fit_is_refused(drafter: str, rule: str) -> None:
    assert refused(drafter, rule)


def test_the_table_tests_what_it_says() -> None:
    """Guard of the suite: some drafts are accepted and some rejected, some sequences end early, prompts come in chunks."""
    seen = engine(MODEL, DRAFTERS["model"](MODEL, 3), load_rule("speculative_sampling"), 3)
    results = [r for seed in (100, 200) for r in seen.generate(PROMPTS, params("temperature 1", seed))]
    assert seen.counts.accepted > 10
    assert seen.counts.rejected > 5
    assert {o.finish_reason for r in results for o in r.outputs} == {"stop", "length"}
