"""The worker's end of the line to `peers.py`: one JSON object per line, in on stdin, out on stdout.

A worker runs in the environment of its engine, so it imports that engine, this file and `completion.py` (standard library only)
and nothing else of ours. First line in: what to load. First line out: `{"ready": true, ...}`. Then one command in, one result out,
until stdin ends. Whatever an engine prints goes to stderr, which the orchestrator keeps as a log.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Load:
    """What a worker serves.

    target, draft: checkpoint folders. capacity: most prompts at once. length: most tokens of a sequence, with its
    prompt. options: what distinguishes workers that share a script.
    """

    target: str
    draft: str
    dtype: str
    capacity: int
    length: int
    threads: int
    options: dict[str, Any]


@dataclass(frozen=True)
class Command:
    """One generation: `tokens` new tokens behind each prompt, end of sequence ignored; temperature 0 is greedy.

    setting: what distinguishes the arms that share a worker.
    """

    prompts: list[list[int]]
    tokens: int
    temperature: float
    seed: int
    setting: dict[str, Any]


Run = Callable[[Command], dict[str, Any]]


def timed(generate: Callable[[], list[list[int]]], command: Command) -> dict[str, Any]:
    """Seconds and new tokens of `generate`, which returns the new tokens per prompt; an error unless all are there."""
    start = time.perf_counter()
    new = generate()
    seconds = time.perf_counter() - start
    lengths = [len(tokens) for tokens in new]
    if lengths != [command.tokens] * len(command.prompts):
        raise RuntimeError(f"asked for {command.tokens} tokens for each of {len(lengths)} prompts, got {lengths}")
    return {"seconds": seconds, "tokens": sum(lengths)}


def serve(load: Callable[[Load], tuple[Run, dict[str, str]]]) -> None:
    """Read what to load, load it, answer commands. `load` returns the function that runs one, and library versions."""
    line_out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print to stdout, their C++ parts too

    def say(message: dict[str, Any]) -> None:
        line_out.write(json.dumps(message) + "\n")
        line_out.flush()

    try:
        start = time.perf_counter()
        run, versions = load(Load(**json.loads(sys.stdin.readline())))
        say({"ready": True, "seconds": time.perf_counter() - start, "versions": versions})
        for line in sys.stdin:
            say(run(Command(**json.loads(line))))
    except Exception as error:  # the orchestrator drops this worker's arms and goes on with the others
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]})
