"""The table of machines is consistent, and own figures replace those of the table and nothing else."""

from __future__ import annotations

import json
import sys

import pytest

from outrider.cli.main import main
from outrider.theory.hardware import HARDWARE, own


def test_every_machine_says_where_its_figures_are_from() -> None:
    """A roofline has its ridge between an old CPU's and a server GPU's: a row with a wrong unit is far outside."""
    for name, machine in HARDWARE.items():
        assert name == name.lower() and len(machine.source) > 15
        assert 4 <= machine.compute / machine.bandwidth <= 500, name
        assert 4e9 <= machine.memory <= 300e9, name


def test_own_figures_replace_those_of_the_table() -> None:
    base = HARDWARE["rtx-4090"]
    assert own(base, None, None, None) is base
    mine = own(base, 1e11, None, None)
    assert (mine.bandwidth, mine.compute, mine.memory) == (1e11, base.compute, base.memory)
    assert "own figures of bandwidth" in mine.source and base.source in mine.source
    assert own(base, 1e11, 1e12, 8e9).name == "your machine"
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        own(base, -1.0, None, None)


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["outrider", "theory", "speedup", *options])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_half_the_bandwidth_is_half_the_speed_where_memory_is_the_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speeds = []
    for bandwidth in ("80", "40"):
        asked = ("--hardware", "laptop-ddr5", "--bandwidth", bandwidth, "--flops", "1000", "--json")
        assert run(monkeypatch, *asked) == 0
        speeds.append(json.loads(capsys.readouterr().out)["plain"]["tokens_per_second"])
    assert speeds[0] == pytest.approx(2 * speeds[1], rel=1e-3)
    assert run(monkeypatch, "--bandwidth", "0") == 2
    assert "bandwidth must be positive" in capsys.readouterr().err
