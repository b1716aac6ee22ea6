"""Gates decide by their margins: the same passes, planted regressions fail, and a run is found wherever it was kept."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from outrider.errors import ConfigError
from outrider.evaluate.bench.gate import Margins, gate, load_run, overall
from outrider.evaluate.records import Record, Timing
from outrider.records import PHASES, Counts
from tests.evaluate.test_store import bench


def records(speed: float, *, accept: float = 0.8, noise: float = 0.02, seed: int = 0, nll: float = 2.0) -> list[Record]:
    """A run of 24 groups: a plain arm and one that is `speed` times faster."""
    chance = random.Random(seed)
    out = []
    for g in range(24):
        base = chance.uniform(0.5, 2.0)
        for arm, factor in (("plain", 1.0), ("length 4", speed)):
            seconds = base / factor * (1 + noise * chance.gauss(0, 1))
            judged = 100 if arm != "plain" else 0
            taken = round(judged * accept)
            counts = Counts(30, judged, judged, taken, judged - taken, 100, judged * (1 - accept), judged * 0.16)
            phases = dict.fromkeys(PHASES, seconds / 4)
            text = (Timing(0.1, seconds, 100),)
            out.append(Record(arm, g, 0, 0, 100, seconds, phases, counts, 0, text, 0, (), 100 * nll))
    return out


def outcome(run: list[Record], base: list[Record], what: str, **margins: float) -> str:
    found = gate(run, base, Margins(**margins), relative=True)
    return next(c.outcome for c in found if c.arm == "length 4" and c.what.startswith(what))


def test_gates_pass_the_same_and_fail_planted_regressions() -> None:
    base = records(1.5, seed=1)
    assert overall(gate(records(1.5, seed=2), base, Margins(), relative=True)) == ("passed", 0)
    assert outcome(records(1.2, seed=2), base, "speed") == "failed"
    assert outcome(records(1.5, accept=0.7, seed=2), base, "acceptance") == "failed"
    assert outcome(records(1.5, nll=2.1, seed=2), base, "quality") == "failed"
    assert outcome(records(1.5, noise=0.5, seed=2), base, "speed", speed=0.01) == "inconclusive"


def test_gates_fail_on_a_broken_ledger_and_on_loops() -> None:
    base, run = records(1.5), records(1.5, seed=2)
    for r in run:
        r.counts.risk *= 0.3
    assert outcome(run, base, "exactness") == "failed"
    loops = [replace(r, loops=1) for r in records(1.5, seed=3)]
    assert outcome(loops, base, "health") == "failed"
    assert overall(gate(loops, base, Margins(), relative=True))[1] == 1


def test_runs_are_found_in_stores_and_files(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    made = bench(path)
    config, back = load_run("kill", path)
    assert config["batch"] == 1
    assert {r.key: r.outputs for r in back} == {r.key: r.outputs for r in made}
    with pytest.raises(ConfigError, match="no such store"):
        load_run("kill", tmp_path / "none.db")
    with pytest.raises(ConfigError, match="in common"):
        gate(made, [replace(r, arm="other") for r in made], Margins(), relative=False)
