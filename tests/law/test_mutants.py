"""EX-11 for rules: every planted mistake is killed by the check that its row names, and rules without one pass all checks.

A mutant is an edit of a function's syntax tree (`tests.mutants`), so the table can only be out of date loudly; those of the
native passes are patches of their text. The checks are those of `rule_checks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from outrider.nn import compiled
from outrider.verify import native
from tests.compilers import needs_compiler
from tests.law.lab import assert_exact, examine
from tests.law.rule_checks import (
    CHECKS,
    chains,
    decoding,
    ends,
    independence,
    ledger,
    long_draws,
    long_overlaps,
    long_rows,
    matching,
    support,
    trees,
)
from tests.law.test_block_rule import NEAR, BlockEnumerator
from tests.law.test_block_rule import RULE as BLOCK
from tests.law.worlds import Shape, chain, random_world
from tests.mutants import Around, Edit, Place

# ----------------------------------------------------------------- where the mistakes are planted
CHAIN, TREE, MATCH, COMMON = (f"outrider.verify.{name}" for name in ("chain", "tree", "match", "numerics"))
COIN = Place(CHAIN, "accept_prefix")
PARENT_ROWS = Place("outrider.types", "Draft.parent_rows")
JUDGED = Place(CHAIN, "verify_chains")
FINISH, LEDGER = Place(CHAIN, "last_token"), Place(CHAIN, "verdict_of")
COINS, DRAW, SUBTRACT, OVERLAP, VERDICT = (
    Place(COMMON, name) for name in ("draw", "draw_at", "subtract", "overlap", "verdict")
)
WALK, NODES, DRAWN = Place(TREE, "_walk"), Place(TREE, "recursive_rejection"), Place(TREE, "SiblingDistributions.drawn")
UNIFORM, EXPONENTIAL = (Place("outrider.noise", f"Noise.{name}") for name in ("uniform", "exponential"))
MATCH_WALK, RACE, AGREE = (Place(MATCH, name) for name in ("_walk", "target_token", "match_probability"))


def lane_of(name: str, other: str) -> Callable:
    """Numbers of lane `name` are those of another lane."""
    return lambda uniform, noise, b, depth, lane, index=0: uniform(
        noise, b, depth, other if lane == name else lane, index
    )


ACCEPTED, LAST = "U * R < P", "torch.searchsorted(C, L * T, right=True)"
RESIDUAL, WITHOUT = "c.draw_residual(H, Q, R, W, U)", "c.draw_without(H, T, U)"
BEHIND, BEHIND_TOO_FEW = "nodes[accepted - 1] if accepted else -1", "nodes[accepted - 2] if accepted > 1 else -1"
REFUSED_ROW = "p[draft.row(b, nodes[min(accepted, len(nodes) - 1)]) :][:1]"
ONE_DISTRIBUTION, NUMBER = "len(A) == len(B) and len(R) == 1 and X", "F(S, L, P, depth, I)"
FINAL_COIN, ACCEPT_COIN = "N.uniform(B, D, 'final')", "N.uniform(B, D, 'accept')"
ONE_HOT, HALF_HOT = (
    f"T >= {top} and len(O := {columns}.nonzero()) == 1" for top, columns in ((1.0, "P"), (0.5, "(P == T)"))
)
TO_SUPPORT, TO_WRONG_COLUMNS = "W.index_add_(1, S, ...)", "W.index_add_(1, S.sort()[0], ...)"
MUTANTS = [  # name, mistake, the check that kills it
    ("chain: accepts every draft", Edit(COIN, f"not {ACCEPTED}", "False"), chains),
    ("chain: inverted ratio", Edit(COIN, ACCEPTED, "U * P < R"), chains),
    ("chain: compares with p only", Edit(COIN, ACCEPTED, "U < P"), chains),
    ("chain: acceptance coin picks the residual", Edit(FINISH, FINAL_COIN, ACCEPT_COIN), chains),
    ("chain: judged by its own row", Edit(PARENT_ROWS, "below + up", "below + k"), chains),
    ("chain: anchor row of a neighbour", Edit(PARENT_ROWS, "owner[below + k]", "0"), chains),
    ("chain: bonus from the row before", Edit(FINISH, BEHIND, BEHIND_TOO_FEW), chains),
    ("chain: residual of the refused row", Edit(FINISH, "p[row : row + 1]", REFUSED_ROW), chains),
    ("chain: residual with another node's distribution", Edit(FINISH, "Q.row[k]", "Q.row[draft.offsets[b]]"), chains),
    ("chain: residual drawn from p", Edit(FINISH, RESIDUAL, "c.draw_one(H, U)"), chains),
    ("chain: refused point mass stays in", Edit(FINISH, WITHOUT, "c.draw_one(H, U)"), chains),
    ("chain: last token of a neighbour", Edit(JUDGED, "last_token(P, D, N, b, A[b], W, Q)", "last_token(P, D, N, 0, A[0], W, Q)"), chains),
    ("chain: rejection not counted as judged", Edit(LEDGER, "nodes[: n + 1]", "nodes[:n]"), ledger),
    ("chain: unjudged nodes in the ledger", Edit(LEDGER, "nodes[: n + 1]", "nodes"), ledger),
    ("chain: risk from the next row", Edit(JUDGED, "draft.parent_rows[k]", "min(draft.parent_rows[k] + 1, len(p) - 1)"), ledger),
    ("chain: risk with another distribution", Edit(JUDGED, "Q.row[k]", "Q.row[0]"), ledger),
    ("residual |p - q|", Edit(SUBTRACT, "W.clamp_(min=0)", "W.abs_()"), chains),
    ("residual not normalised", Edit(DRAW, LAST, "torch.searchsorted(C, L, right=True).clamp(max=weight.shape[1] - 1)"), chains),
    ("residual by argmax", Edit(DRAW, f"{LAST}.squeeze(1)", "weight.argmax(1)"), chains),
    ("draw: coin 0 takes the first column", Edit(DRAW, LAST, "torch.searchsorted(C, L * T, right=False)"), ends),
    ("draw: coin 1 runs past the last column", Edit(COINS, "[min(X, L) for X in U]", "[X for X in U]"), ends),
    ("draw: long rows forget the blocks before", Edit(DRAW, "L - C.gather(1, B) + M.gather(1, B)", "L"), long_rows),
    ("draw: block number dropped", Edit(DRAW, "B * BLOCK + I", "I"), long_rows),
    ("draft vocabulary ignored in the residual", Edit(SUBTRACT, TO_SUPPORT, TO_WRONG_COLUMNS), support),
    ("draft vocabulary ignored in the overlap", Edit(OVERLAP, "P.index_select(1, S)", "P[:, : len(S)]"), support),
    ("ledger: overlap is a maximum", Edit(OVERLAP, "torch.minimum(P, Q)", "torch.maximum(P, Q)"), ledger),
    ("ledger: variance is the mean", Edit(VERDICT, "R * (1.0 - R)", "R"), ledger),
    ("tree: sibling order ignored", Edit(NODES, "for K in C: ...", "for K in reversed(C): ..."), trees),
    ("tree: residual mass ignored", Edit(NODES, "M = float(C.row_sums(W))", "M = 1.0"), trees),
    ("tree: drawn sibling stays in its distribution", Edit(DRAWN, "L[0, C] = 0", "pass"), trees),
    ("tree: distribution not normalised after a draw", Edit(DRAWN, "L / R if R > 0 else L", "L"), trees),
    ("tree: i.i.d. read as without replacement", Edit(DRAWN, "S.siblings == 'iid'", "S.siblings != 'iid'"), trees),
    ("tree: siblings share a coin", Edit(WALK, "N.uniform(B, D, 'accept', J)", "N.uniform(B, D, 'accept', 0)"), trees),
    ("tree: stays at the anchor's row", Edit(WALK, "draft.row(b, taken)", "b"), trees),
    ("tree: all refused, drawn from p", Edit(WALK, "R = N.rest", "pass"), trees),
    ("tree: refused point mass stays in", Edit(NODES, "W[0, X] = 0", "pass"), trees),
    ("tree: bonus from the parent's row", Edit(WALK, "R = P[I : I + 1]", "pass"), trees),
    ("tree: risk of the first sibling only", Edit(NODES, "math.prod(B if I else G)", "(B or G)[0]"), ledger),
    ("tree: integrated risk without replacement", Edit(NODES, "len(C) == 1 or L.siblings == 'iid'", "True"), ledger),
    ("tree: point masses left out of the risk", Edit(NODES, ONE_DISTRIBUTION, "bool(A) and X"), ledger),
    ("noise: draft and accept share a lane", Around(UNIFORM, lane_of("draft", "accept")), decoding),
    ("noise: accept and final share a lane", Around(UNIFORM, lane_of("final", "accept")), decoding),
    ("noise: depth ignored", Edit(UNIFORM, NUMBER, "F(S, L, P, 0, I)"), decoding),
    ("noise: stale between steps", Edit(UNIFORM, NUMBER, "F(S, L, 0, depth, I)"), decoding),
    ("noise: siblings not separated", Edit(UNIFORM, NUMBER, "F(S, L, P, depth, 0)"), independence),
    ("noise: one seed for all", Edit(UNIFORM, NUMBER, "F(0, L, P, depth, I)"), decoding),
    ("match: race turned round", Edit(RACE, "P / N.exponential(...)", "P * N.exponential(...)"), matching),
    ("match: greedy above one half", Edit(RACE, ONE_HOT, HALF_HOT), matching),
    ("match: accepts the first child", Edit(MATCH_WALK, "D.tokens[K] == X", "K >= 0"), matching),
    ("match: depth ignored", Edit(MATCH_WALK, "F(P, N, B, len(H) + 1)", "F(P, N, B, 1)"), matching),
    ("match: noise of the anchor at every depth", Edit(EXPONENTIAL, "P[B] + D", "P[B]"), matching),
    ("match: ratios the wrong way round", Edit(AGREE, "S * Q + L * P", "S * P + L * Q"), matching),
]  # fmt: skip

# The same rules where a compiler is: the Python around the native passes, and the passes themselves (by their text).
NATIVE_MUTANTS = [
    ("native chain: acceptance coin picks the residual", Edit(FINISH, FINAL_COIN, ACCEPT_COIN), chains),
    ("native chain: residual drawn from p", Edit(FINISH, RESIDUAL, "c.draw_one(H, U)"), chains),
    ("native chain: refused point mass stays in", Edit(FINISH, WITHOUT, "c.draw_one(H, U)"), chains),
    ("native chain: last token from the anchor", Edit(FINISH, "p[row : row + 1]", "p[b : b + 1]"), chains),
    ("native chain: risk from the next row", Edit(JUDGED, "draft.parent_rows[k]", "min(draft.parent_rows[k] + 1, len(p) - 1)"), ledger),
    ("native chain: risk with another distribution", Edit(JUDGED, "Q.row[k]", "0"), ledger),
]  # fmt: skip


def blocks() -> None:
    """Output distribution and ledger of block verification, which is compiled as a whole, by enumeration.

    One probe in 150 of two drawn tokens tells a residual from that of the weight one: so there are many of them.
    """
    rng = np.random.default_rng(31)
    shapes = [chain(1), chain(2), Shape((-1, 0), (True, False)), chain(2, has_q=False)]
    worlds = [random_world(rng, 3, shape) for shape in (*shapes, *[chain(2)] * 15) for _ in range(4)]
    found = examine(BLOCK, worlds, rng, edge=NEAR, enumerator=BlockEnumerator)
    assert_exact(found, 1e-9)


CXX_MUTANTS = [
    ("residual |p - q|", "return x > 0 ? x : 0.0;", "return x > 0 ? x : -x;", chains),
    ("blocks before the last are forgotten", "at = static_cast<int64_t>(b) * BLOCK", "at = 0", long_draws),
    ("overlap is a maximum", "both = here < q[i] ? here : q[i];", "both = here < q[i] ? q[i] : here;", ledger),
    ("vector overlap is a maximum", "return a < b ? a : b;", "return a < b ? b : a;", long_overlaps),
    ("block: chances are not multiplied", "clamp01(above * px / qx)", "clamp01(px / qx)", blocks),
    ("block: a refused point mass stays in", "refused && !drawn ? s.token[first + taken] : -1", "-1", blocks),
]  # fmt: skip
FURTHER_CXX_MUTANTS = [
    ("residual not normalised", "double left = u * *total;", "double left = u;", chains),
    ("the residual's q is left out", "(q ? static_cast<double>(q[i]) : 0.0)", "0.0", chains),
    ("block: the residual forgets what was kept", "drawn && taken ? keep[taken - 1] : 1.0", "1.0", blocks),
    ("block: the row above", "s.sequences + first + i - 1", "s.sequences + first + i - (i > 1 ? 2 : 1)", blocks),
    ("block: the first coin that refuses ends the chain", "bottom < top || bottom <= 0.0", "bottom < here || bottom <= 0.0", blocks),
    ("block: the whole draft has no variance", "spread + whole * (1.0 - whole)", "spread", blocks),
]  # fmt: skip


@pytest.fixture
def torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No native passes: the twins that a GPU, or a machine without a compiler, runs."""
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_rules_without_a_mistake_pass(check):
    check()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_rules_without_a_mistake_pass_on_torch_alone(check, torch_only):
    check()


@needs_compiler
@pytest.mark.parametrize("check", [long_draws, long_overlaps, blocks])
def test_the_native_passes_without_a_mistake_pass(check):
    check()


def test_the_table_is_large_and_uses_every_check():
    assert len(MUTANTS) >= 30
    assert len({name for name, *_ in MUTANTS}) == len(MUTANTS)
    assert {check for *_, check in MUTANTS} == set(CHECKS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[0])
def test_mutant_is_killed(mutant, torch_only, monkeypatch):
    _, mistake, check = mutant
    mistake.plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check()


@pytest.mark.skipif(not native.serve(torch.zeros(1)), reason="needs a C++ compiler")
@pytest.mark.parametrize("mutant", NATIVE_MUTANTS, ids=lambda mutant: mutant[0])
def test_mutant_beside_native_passes_is_killed(mutant, monkeypatch):
    _, mistake, check = mutant
    mistake.plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check()


@pytest.mark.skipif(not native.serve(torch.zeros(1)), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "mutant",
    [*CXX_MUTANTS, *(pytest.param(m, marks=pytest.mark.slow) for m in FURTHER_CXX_MUTANTS)],  # each is compiled
    ids=lambda mutant: mutant[0],
)
def test_mutant_of_the_native_passes_is_killed(mutant, tmp_path, monkeypatch):
    _, old, new, check = mutant
    sources = {path.name: path.read_text() for path in native.PASSES.sources}
    count = sum(source.count(old) for source in sources.values())
    assert count == 1, f"the passes hold {count} times {old!r}: update the mutant"
    for name, source in sources.items():
        (tmp_path / name).write_text(source.replace(old, new))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "PASSES", replace(native.PASSES, folder=tmp_path))
    # the same numbers, compiled in a third of the time
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-O0"))
    native.library.cache_clear()
    try:
        assert native.library() is not None
        with pytest.raises(AssertionError):
            check()
    finally:
        native.library.cache_clear()
