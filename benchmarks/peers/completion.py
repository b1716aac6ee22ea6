"""llama.cpp's `/completion`, as its workers ask it: one prompt, all tokens. Standard library only, as `channel.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import channel

Post = Callable[[dict[str, Any]], dict[str, Any]]
"""Sends a body, returns the server's answer."""


def runner(post: Post) -> channel.Run:
    """A worker's `run` over a server with one sequence."""
    told: dict[str, Any] = {}

    def generate(command: channel.Command) -> list[list[int]]:
        [prompt] = command.prompts
        found = post(
            {
                "prompt": prompt,
                "n_predict": command.tokens,
                "temperature": command.temperature,
                "seed": command.seed,
                "samplers": ["temperature"],
                "cache_prompt": False,
                "ignore_eos": True,
                "return_tokens": True,
            }
        )
        told.update(found["timings"])
        return [found["tokens"]]

    def run(command: channel.Command) -> dict[str, Any]:
        told.clear()
        found = channel.timed(lambda: generate(command), command)
        accepted = told.get("draft_n_accepted", 0)
        return found | {"calls": found["tokens"] - accepted, "drafted": told.get("draft_n", 0)}

    return run
