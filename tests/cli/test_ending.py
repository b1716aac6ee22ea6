"""The second Ctrl-C ends a server at any moment, also while the line about the first one is being written."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outrider.cli import ending


class Ended(BaseException):
    """Instead of the end of the process."""


class Raw(io.RawIOBase):
    """A stream that is told to end in the middle of its first write, as by a signal."""

    def __init__(self, told: ending.Told) -> None:
        self.told, self.seen = told, b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        first, self.seen = not self.seen, self.seen + bytes(data)
        if first:
            self.told(False)
        return len(data)


def test_a_second_signal_within_the_first_ones_line_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []

    def leave(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(ending.os, "_exit", leave)
    write = ending.os.write
    monkeypatch.setattr(
        ending.os, "write", lambda to, data: written.append(data) if to == ending.STDERR else write(to, data)
    )
    told = ending.Told("here", 30.0)
    stream = Raw(told)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(stream), line_buffering=True))
    with pytest.raises(Ended) as end:
        told(False)
    assert end.value.args == (ending.INTERRUPTED,)
    assert b"".join(written).endswith(b"\noutrider: interrupted\n") and b"no request is open" in stream.seen
    monkeypatch.undo()


def test_ctrl_c_while_the_program_is_imported_is_no_traceback(tmp_path: Path) -> None:
    """By a module of the command line that is interrupted while it is imported."""
    code = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'outrider.cli.doctor':\n            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from outrider.__main__ import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\noutrider: interrupted\n")
