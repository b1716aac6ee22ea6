"""How long a compiler may take: as long as it likes where a wheel is built, and not for ever where somebody waits."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from outrider import isa
from outrider.cli import terminal
from outrider.nn import compiled


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that each call of a compiler was given; it writes what it was asked for."""
    given: list[float] = []

    def run(command: list[str], *, timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
        given.append(timeout)
        Path(command[command.index("-o") + 1]).write_bytes(b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(compiled.subprocess, "run", run)
    return given


def test_a_busy_machine_costs_a_wheel_no_library(asked: list[float], tmp_path: Path) -> None:
    level = isa.LEVELS["x86_64"][0]
    library = compiled.build_for_wheel(compiled.DECODER, ["c++"], level, tmp_path)
    assert (
        library.exists() and set(asked) == {compiled.WHEEL_TIMEOUT} and compiled.WHEEL_TIMEOUT > 10 * compiled.TIMEOUT
    )
    compiled.compile_unit(compiled.DECODER, ["c++"], (), tmp_path / "own.so")
    assert asked[-1] == compiled.TIMEOUT


def test_a_compiler_that_takes_too_long_is_said_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(command: list[str], *, timeout: float, **_: Any) -> Any:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(compiled.subprocess, "run", run)
    with pytest.raises(compiled.BuildError, match=r"^c\+\+ did not end within 300 s$") as error:
        compiled.compile_unit(compiled.DECODER, ["c++"], (), tmp_path / "own.so")
    assert "less busy" in error.value.remedy


def test_the_command_line_says_that_something_is_compiled(asked: list[float], tmp_path: Path, capsys: Any) -> None:
    terminal.show_waiting()
    terminal.show_waiting()  # twice is as once
    compiled.compile_unit(compiled.DECODER, ["c++"], (), tmp_path / "own.so")
    assert capsys.readouterr().err.count("compiling the native library 'decoder', once on this machine") == 1
