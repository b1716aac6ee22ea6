"""A process that performs cells: one JSON line in, one or two out. It ends with its driver, however that ends.

    python -m outrider.evaluate.sweep.worker MODULE:FUNCTION

The function gets a job and returns plain data. What libraries print goes to stderr: stdout is the driver's.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import threading
from typing import Any, BinaryIO


def listen(lines: BinaryIO, jobs: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Take jobs until the driver is gone, also while one is being performed."""
    for line in lines:
        jobs.put(json.loads(line))
    os._exit(0)


def main(address: str) -> None:
    """Perform jobs for ever."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(sys.stdin.buffer, jobs), daemon=True).start()

    def say(message: dict[str, Any]) -> None:
        rest = memoryview(json.dumps(message).encode() + b"\n")
        while rest:
            rest = rest[answers.write(rest) or 0 :]

    module, _, name = address.partition(":")
    while True:
        job = jobs.get()
        say({"ticket": job["ticket"], "started": os.getpid()})
        try:
            found = {"answer": getattr(importlib.import_module(module), name)(job)}
        except Exception as error:  # the cell's, not the worker's: the next one may be fine
            from outrider.evaluate.sweep.work import refusal  # here: a worker starts without anything heavy

            found = refusal(error)
        say({"ticket": job["ticket"], **found})


if __name__ == "__main__":
    main(sys.argv[1])
