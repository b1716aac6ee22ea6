"""How long a compiler may take: as long as it likes where a wheel is built, and not for ever where somebody waits."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, ClassVar

import pytest

from outrider import isa
from outrider.cli import terminal
from outrider.nn import compiled


class Compiler:
    """A process of a compiler that writes what it was asked for, or never ends."""

    pid = 4242
    returncode: int | None = None
    given: ClassVar[list[float]] = []
    ends: ClassVar[bool] = True

    def __init__(self, command: list[str], **_: Any) -> None:
        self.command = command

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None: ...

    def communicate(self, timeout: float) -> tuple[str, str]:
        self.given.append(timeout)
        if not self.ends:
            raise subprocess.TimeoutExpired(self.command, timeout)
        Path(self.command[self.command.index("-o") + 1]).write_bytes(b"")
        self.returncode = 0
        return "", ""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that each call of a compiler was given."""
    monkeypatch.setattr(Compiler, "given", [])
    monkeypatch.setattr(compiled.subprocess, "Popen", Compiler)
    return Compiler.given


def test_a_busy_machine_costs_a_wheel_no_library(asked: list[float], tmp_path: Path) -> None:
    level = isa.LEVELS["x86_64"][0]
    library = compiled.build_for_wheel(compiled.DECODER, ["c++"], level, tmp_path)
    assert (
        library.exists() and set(asked) == {compiled.WHEEL_TIMEOUT} and compiled.WHEEL_TIMEOUT > 10 * compiled.TIMEOUT
    )
    compiled.compile_unit(compiled.DECODER, ["c++"], (), tmp_path / "own.so")
    assert asked[-1] == compiled.TIMEOUT


def test_a_compiler_that_takes_too_long_is_said_with_a_remedy(
    asked: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(Compiler, "ends", False)
    monkeypatch.setattr(compiled.os, "killpg", lambda group, _: killed.append(group))
    with pytest.raises(compiled.BuildError, match=r"^c\+\+ did not end within 300 s$") as error:
        compiled.compile_unit(compiled.DECODER, ["c++"], (), tmp_path / "own.so")
    assert "less busy" in error.value.remedy
    assert (killed, asked) == ([Compiler.pid], [compiled.TIMEOUT])


def test_the_command_line_says_that_something_is_compiled(asked: list[float], tmp_path: Path, capsys: Any) -> None:
    terminal.show_waiting()
    terminal.show_waiting()  # twice is as once
    compiled.compile_unit(compiled.DECODER, ["c++"], (), tmp_path / "own.so")
    assert capsys.readouterr().err.count("compiling the native library 'decoder', once on this machine") == 1
