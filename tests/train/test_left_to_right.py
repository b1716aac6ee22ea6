"""The experiment on objectives, all stages, on a tiny checkpoint: complete, resumable, paired; its page says what was measured."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import make_checkpoint

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NAMES = ("left_to_right", *(f"left_to_right_{part}" for part in ("longer", "measure", "report", "setting")))


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import left_to_right  # type: ignore[import-not-found]

    yield left_to_right
    for name in NAMES:
        sys.modules.pop(name, None)


def config(recipe, place: Path):
    make_checkpoint(place / "target", "llama", tokenizer=True)
    texts = place / "texts"
    texts.mkdir()
    for i in range(90):
        (texts / f"{i}.py").write_text("\n".join(f"the {j}th line of text number {i}, {i * j}" for j in range(40)))
    quick = replace(recipe.Config(), **recipe.QUICK)
    return replace(
        quick,
        work=place / "work",
        target=place / "target",
        source=texts,
        steps=4,
        rows=12,
        prompts=6,
        blocks=(3, 4),
        tuned_block=4,
    )


@pytest.mark.slow
def test_the_whole_experiment(recipe, tmp_path: Path, capsys) -> None:
    one = config(recipe, tmp_path)
    recipe.run(one, (*recipe.STAGES[:-1], "longer", "report"))
    report, arms = sys.modules["left_to_right_report"], sys.modules["left_to_right_setting"].LONGER
    results = report.read(one.work)
    assert len(results) == len(recipe.planned(one)) == 5 * 2 * 2 + 2 * 2
    longer = report.read(one.work, "longer")
    assert set(longer) == set(recipe.planned_longer(one)) == {(a, 4, s, "training") for a in arms for s in (0, 1)}
    assert {r["steps"] for r in longer.values()} == {one.longer * one.steps}
    for (arm, block, seed, part), r in (*results.items(), *longer.items()):
        assert (r["arm"], r["block"], r["seed"], r["part"]) == (arm, block, seed, part)
        for way in report.WAYS:
            emitted, rounds = np.array(r[way]["emitted"]), np.array(r[way]["rounds"])
            assert (emitted >= rounds).all(), "every round emits a token"
            assert (emitted <= block * rounds).all()
            assert rounds.sum() > 0
            assert r[way]["judged_at"][0] == rounds.sum()
            assert sum(r[way]["accepted_at"]) == (emitted - rounds).sum()
    assert not list(one.work.glob("runs/*/step-*")), "checkpoints of finished runs are gone"
    page = (one.work / "left_to_right.md").read_text()
    assert "{{" not in page and "missing" not in page
    assert f"```\n{one.command}\n```" in page
    uniform = report.tau(results, "uniform", 4, [0, 1], "training", "greedy")
    assert f"| uniform | 2 | {uniform:.3f} |" in page
    assert (one.work / "figures" / "left_to_right.png").stat().st_size > 5000
    for c in json.loads((one.work / "check.json").read_text()):
        assert c["engine"][1] == pytest.approx(c["walk"][1], abs=8), "the engine's rounds are the walk's, but for ties"

    # nothing is done twice, and a missing run is made again, to the same numbers
    capsys.readouterr()
    recipe.run(one, ("data", "tune", "runs", "longer"))
    assert "--- " not in capsys.readouterr().out
    gone = recipe.folder_of(one, "chain", 4, 1, "training") / "result.json"
    before = json.loads(gone.read_text())
    gone.unlink()
    assert "missing: runs/training-4-chain-1" in recipe.unfinished(one)
    recipe.run(one, ("runs",))
    said = capsys.readouterr().out
    assert said.count("--- run") == 1
    timings = {"training_seconds"}
    assert {k: v for k, v in json.loads(gone.read_text()).items() if k not in timings} == {
        k: v for k, v in before.items() if k not in timings
    }


def test_rows_end_where_they_go_in_circles(recipe) -> None:
    import torch

    measuring = sys.modules["left_to_right_measure"]

    line = list(range(20))
    turning = [*line[:12], *line[4:12]]  # the 8-gram 4 .. 11 ends a second time at place 20
    assert measuring.ends(torch.tensor([line, turning])) == [20, 20]
    assert measuring.ends(torch.tensor([turning + line[12:20]])) == [20]
    assert measuring.ends(torch.tensor([[1] * 30])) == [9]
    assert measuring.before(18, [1, 0, 3, 2], 8, 4) == [1, 0, 3]  # anchors 8, 10, 11, 15; the last block is 15 .. 18
    assert measuring.before(19, [1, 0, 3, 2], 8, 4) == [1, 0, 3, 2]
    assert measuring.before(14, [1, 0, 3, 2], 8, 4) == [1, 0]
    assert measuring.before(9, [1, 0, 3, 2], 8, 4) == []


def test_gains_are_paired(recipe) -> None:
    """An arm against itself gains nothing, exactly; against a copy with one more token in every round, exactly that."""
    import left_to_right_report as report  # type: ignore[import-not-found]

    random = np.random.default_rng(0)

    def made(more: int) -> dict:
        rounds = random.integers(5, 30, 12)
        return {"greedy": {"emitted": (rounds * (2 + more)).tolist(), "rounds": rounds.tolist()}}

    results = {("uniform", 8, s, "training"): made(0) for s in range(3)}
    results |= {("chain", 8, s, "training"): made(1) for s in range(3)}
    same = report.gain(results, "chain", "chain", 8, "training", "greedy")
    assert (same["value"], same["low"], same["high"], same["claim"]) == (0.0, 0.0, 0.0, False)
    more = report.gain(results, "chain", "uniform", 8, "training", "greedy")
    assert more["value"] == pytest.approx(50.0)
    assert more["seeds"] == [50.0] * 3
    assert more["claim"]


def test_growth_of_a_gain(recipe) -> None:
    """A training against itself changes no gain, exactly; where uniform weights stay and the arm goes from 2 to 3, it is 50%."""
    import left_to_right_longer as longer  # type: ignore[import-not-found]

    random = np.random.default_rng(2)

    def made(tokens: int) -> dict:
        rounds = random.integers(5, 30, 12)
        ways = {w: {"emitted": (rounds * tokens).tolist(), "rounds": rounds.tolist()} for w, _ in longer.BOTH}
        return ways | {"steps": 10 * tokens}

    short = {(a, 8, s, "training"): made(2) for s in range(3) for a in ("uniform", "chain", "decay")}
    long = {(a, 8, s, "training"): made(t) for s in range(3) for a, t in (("uniform", 2), ("chain", 3))}
    same, more = (longer.growth(short, x, "chain", 8, "greedy") for x in (short, long))
    assert same["value"] == pytest.approx(0, abs=1e-9) and not same["claim"]
    assert (more["value"], more["low"], more["high"], more["claim"]) == (*[pytest.approx(50.0)] * 3, True)
    assert longer.arms_of(short, long, 8) == ["uniform", "chain"]
    assert "the gain grows" in longer.verdict(short, long, 8)
    assert "was not run" in longer.section(short, {}, 8, 4) and longer.verdict(short, {}, 8) == ""


def test_the_page_names_the_command_that_made_it(recipe, monkeypatch) -> None:
    kept = []
    monkeypatch.setattr(recipe, "run", lambda config, stages: kept.append((config.command, stages)))
    for given in (["all"], ["report", "--blocks", "8", "--seeds", "2", "--work", "elsewhere"]):
        monkeypatch.setattr(sys, "argv", ["left_to_right.py", *given])
        recipe.main()
    whole = "python recipes/left_to_right.py all"
    assert kept == [(whole, recipe.STAGES), (f"{whole} --blocks 8 --seeds 2", ("report",))]


def test_noise_is_rarely_claimed(recipe) -> None:
    """Two arms of one distribution: of 200 experiments at most 5% + 5 standard errors claim a gain in either direction."""
    import left_to_right_report as report  # type: ignore[import-not-found]

    random, claims, many = np.random.default_rng(1), 0, 200
    for _ in range(many):
        results = {}
        for arm in ("uniform", "chain"):
            for s in range(3):
                rounds = random.integers(40, 60, 32)
                tokens = random.binomial(7, 0.2, (32, 60)) + 1
                emitted = [int(t[:n].sum()) for t, n in zip(tokens, rounds, strict=True)]
                results[arm, 8, s, "training"] = {"greedy": {"emitted": emitted, "rounds": rounds.tolist()}}
        claims += report.gain(results, "chain", "uniform", 8, "training", "greedy")["claim"]
    assert claims <= many * 0.05 + 5 * (many * 0.05 * 0.95) ** 0.5
