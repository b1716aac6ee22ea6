"""Ctrl-C at any moment: exit code 130, one line, no traceback, the cursor back, and no half-written file."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

MOMENT, AGAIN = 0.2, 20.0
"""Seconds between what was printed and the key, and until a person would press it again: Python notices a signal that
arrives in the microseconds between its last look and a blocking read only with the next one."""


def run_until(argv: list[str], *ready: bytes, patience: float = 90.0) -> tuple[int, bytes, list, list]:
    """Start `outrider` on a terminal of its own, press Ctrl-C once each of `ready` was printed, in turn; exit code, output,
    terminal settings."""
    leader, follower = pty.openpty()
    before = termios.tcgetattr(follower)
    child = subprocess.Popen(
        [sys.executable, "-m", "outrider.cli.main", *argv],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a runner in the background may ignore it
        # no history is kept
        env={**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": os.devnull},
    )
    seen, press_at, end = b"", None, time.monotonic() + patience
    waiting = list(ready)
    try:
        while time.monotonic() < end:
            if select.select([leader], [], [], 0.05)[0]:
                seen += os.read(leader, 65536)
            if waiting and waiting[0] in seen:
                press_at = time.monotonic() + MOMENT
                waiting.pop(0)
            if press_at is not None and time.monotonic() >= press_at:
                os.killpg(child.pid, signal.SIGINT)
                press_at = time.monotonic() + AGAIN
            if child.poll() is not None and not select.select([leader], [], [], 0.05)[0]:
                return child.returncode, seen, before, termios.tcgetattr(follower)
        raise AssertionError(f"still running after {patience} s; printed {seen[-500:]!r}")
    finally:
        child.kill()
        child.wait()
        os.close(leader)
        os.close(follower)


ORDER = """
import sys
from outrider.cli.interrupts import keep_interrupts
keep_interrupts()
seen = []
class Spy:
    def find_spec(self, name, path=None, target=None):
        seen.append(name)
sys.meta_path.insert(1, Spy())
finders = len(sys.meta_path)
import torch
assert seen.index("numpy") < seen.index("torch"), seen[:5]
assert len(sys.meta_path) == finders - 1
keep_interrupts()
assert len(sys.meta_path) == finders - 1
"""


def test_pytorch_does_not_import_numpy() -> None:
    """It takes a Ctrl-C meanwhile for NumPy's absence and goes on: NumPy is there before. `command` has its order from `main`."""
    subprocess.run([sys.executable, "-c", ORDER], check=True)
    first = "import sys; sys.argv = ['outrider', '--help']\ntry: main()\nexcept SystemExit: pass\n"
    code = f"from outrider.cli.main import main; {first}print(type(sys.meta_path[0]).__name__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "NumpyFirst False"


GENERATE = ["generate", "import os", "--max-tokens", "900", "--seed", "3", "--json"]


@pytest.mark.parametrize(
    ("argv", "ready"),
    [
        pytest.param(GENERATE, [b"loading"], marks=pytest.mark.slow),
        (["chat"], [b"\n> ", b"Ctrl-C again ends"]),
        pytest.param(
            ["bench", "--count", "16", "--repeats", "50", "--out", "OUT"], [b"loading"], marks=pytest.mark.slow
        ),
        (["bench", "--count", "16", "--repeats", "50", "--out", "OUT"], [b"measuring"]),
    ],
    ids=["before the text", "at the prompt", "while loading", "while measuring"],
)
def test_ctrl_c_leaves_everything_clean(argv: list[str], ready: list[bytes], tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    argv = [str(out) if a == "OUT" else a for a in argv]
    code, seen, before, after = run_until(argv, *ready)
    assert code == 130, seen[-2000:]
    assert b"interrupted" in seen
    assert b"Traceback" not in seen
    assert before == after
    assert seen.rfind(b"\x1b[?25h") >= seen.rfind(b"\x1b[?25l")  # a cursor that was hidden is shown again
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "ready", "said"),
    [
        (["train", "medusa", "--rows", "400", "--work", "WORK"], b"text: ", b"the same command goes on"),
        (["predict", "--count", "64", "--samples", "8"], b"sampling", b"interrupted"),
        (["audit", "--count", "64", "--samples", "16"], b"auditing", b"interrupted"),
        (["demo", "--repeats", "50"], b"measuring", b"interrupted"),
        (["plan", "--rounds", "200"], b"timing", b"interrupted"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_ctrl_c_ends_every_long_command_in_a_line(argv: list[str], ready: bytes, said: bytes, tmp_path: Path) -> None:
    argv = [str(tmp_path / "work") if a == "WORK" else a for a in argv]
    code, seen, before, after = run_until(argv, ready)
    assert code == 130, seen[-2000:]
    words = b" ".join(re.sub(rb"\x1b\[[0-9;?]*[a-z]", b"", seen).split())  # wherever a line was broken
    assert said in words and b"interrupted" in seen and b"Traceback" not in seen
    assert before == after
    assert seen.rfind(b"\x1b[?25h") >= seen.rfind(b"\x1b[?25l")


@pytest.mark.slow
def test_ctrl_c_ends_a_server_that_loads(tmp_path: Path) -> None:
    """Where it has just begun to serve when the key comes, it ends as a server does."""
    code, seen, before, after = run_until(["serve", "--port", "0"], b"loading")
    assert (code == 130 and b"interrupted" in seen) or (code == 0 and b"ending" in seen), seen[-2000:]
    assert b"Traceback" not in seen and before == after
