"""A server whose target is a table, so that the server and not a model is the load: in the test process, or as a program.

    python -m tests.serve.toyserver PORT SLOTS QUEUE PAUSE SURE

PAUSE: seconds that a step sleeps, as if an accelerator worked; the capacity is then known and the processor is nearly idle.
SURE: logit of the token that was there before; the others have 0.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from outrider.build import Engine
from outrider.models.toy import TableTarget
from outrider.serve.app import create_app
from outrider.serve.server import server_for
from outrider.serve.settings import Settings
from outrider.serve.tickets import Limits
from outrider.verify import load_rule
from tests.contract.scripted import Budgets, Scripted
from tests.serve.harness import Running, a_port, rewired, until

V = 16
BODY = {"model": "pycode", "prompt": [3, 1, 4], "max_tokens": 60, "ignore_eos": True, "stream": True}
BODY |= {"return_token_ids": True}  # the toy has no tokenizer: its chunks carry ids


class Slow(TableTarget):
    """V tokens, all alike if `sure` is 0; every forward takes `pause` seconds."""

    def __init__(self, pause: float, sure: float) -> None:
        super().__init__(sure * torch.eye(V))
        self.pause = pause

    def forward(self, *given: Any, **more: Any) -> Any:
        if self.pause:
            time.sleep(self.pause)
        return super().forward(*given, **more)


def toy(slots: int, pause: float = 0.0, sure: float = 0.0) -> Engine:
    """An engine that drafts the last token three times; one draft in sixteen is accepted, more of them the more `sure` it is."""
    guess = lambda view, k: [view.tokens[-1]] * k  # noqa: E731
    parts = (Slow(pause, sure), Scripted(guess, 3), load_rule("speculative_sampling"), Budgets(lambda s: 3))
    return Engine(*parts, slots=slots, max_length=1000)


@dataclass
class Toy:
    """A toy server in a process of its own."""

    running: Running
    process: subprocess.Popen[bytes]

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])

    def descriptors(self) -> int:
        """Open files and sockets."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@contextmanager
def toy_process(slots: int, queue: int, pause: float, sure: float = 0.0) -> Iterator[Toy]:
    port = a_port()
    command = [sys.executable, "-m", "tests.serve.toyserver", *map(str, (port, slots, queue, pause, sure))]
    with subprocess.Popen(command) as process:
        running: Any = Running(port, None, None, None, None)  # type: ignore[arg-type]

        def ready() -> bool:
            try:
                return running.call("GET", "/ready")[0] == 200
            except OSError:
                return False

        try:
            until(ready, 60)
            yield Toy(running, process)
        finally:
            process.terminate()
            assert process.wait(20) == 0


def main(port: int, slots: int, queue: int, pause: float, sure: float) -> None:
    settings = Settings("pycode", limits=Limits(queue=queue, queue_seconds=20), grace=1.0)
    server_for(
        create_app(rewired(toy(slots, pause, sure)), settings, adaptive=False), settings, "127.0.0.1", port
    ).run()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), *map(float, sys.argv[4:]))
