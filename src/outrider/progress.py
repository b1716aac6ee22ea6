"""One progress bar for long work: in a terminal and in a notebook, nowhere else; it vanishes when the work is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Tell = Callable[[float], None]
"""Is told the share of the work that is done, 0 to 1."""
PATIENCE = 1.0
"""Seconds before a bar of a notebook appears: short work leaves none."""


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel (of IPython, imported by whoever started it)."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None and hasattr(module, "get_ipython") else None
    return type(shell).__name__ == "ZMQInteractiveShell"


@contextmanager
def bar(text: str, console: Console, patience: float = 0.0) -> Iterator[Tell]:
    """A bar on `console`, from `patience` seconds on; yields what to tell the share that is done."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    shown, began = Progress(*columns, console=console, transient=True), time.monotonic()
    task = shown.add_task(text, total=1.0)

    def tell(fraction: float) -> None:
        if not shown.live.is_started and time.monotonic() - began >= patience:
            shown.start()
        shown.update(task, completed=fraction)

    if not patience:
        shown.start()
    try:
        yield tell
    finally:
        shown.stop()


@contextmanager
def notebook_bar(text: str, given: Tell | None = None) -> Iterator[Tell | None]:
    """`given`, or a bar if this is a notebook, or None: then nobody wants to know."""
    if given is not None or not in_notebook():
        yield given
        return
    from rich.console import Console

    with bar(text, Console(force_jupyter=True, emoji=False, highlight=False), PATIENCE) as tell:
        yield tell
