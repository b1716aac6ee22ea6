"""What a server says to the terminal, and how it ends when it is told to a second time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from outrider.cli import terminal

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""
STDERR, SHOW_CURSOR = 2, "\x1b[?25h"


class Told:
    """Says where a server is once it answers, and what it waits for when it is asked to end; asked again, it ends at once.

    where: the sentence with the address. grace: seconds that open requests get. open: how many there are.
    """

    def __init__(self, where: str, grace: float) -> None:
        self.where, self.grace, self.asked = where, grace, False
        self.open: Callable[[], int] = lambda: 0

    def __call__(self, serving: bool) -> None:
        if self.asked:
            end_now()
        self.asked = not serving
        print(f"outrider: {self.where if serving else self.waiting()}", file=sys.stderr, flush=True)

    def waiting(self) -> str:
        """What the end waits for."""
        count = self.open()
        if not count:
            return "ending; no request is open"
        requests = "1 open request" if count == 1 else f"{count} open requests"
        return f"ending: {requests} may take up to {self.grace:g} s more; Ctrl-C again ends at once"


def end_now() -> NoReturn:
    """End without waiting for threads that load a model or are in the middle of a step.

    Written past Python's buffers: the second signal may come while the first one's line is written, and a buffered stream refuses a
    second writer with an error, which would leave the process running.
    """
    shown = "" if terminal.plain(terminal.err) else SHOW_CURSOR
    with suppress(OSError):
        os.write(STDERR, f"{shown}\noutrider: interrupted\n".encode())
    os._exit(INTERRUPTED)
