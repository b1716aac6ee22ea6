"""Worker: llama.cpp's own server, as the package xllamacpp carries it, plain greedy decoding of one GGUF file.

The target is the file itself. The prebuilt package is compiled for AVX2.
"""

from __future__ import annotations

import json
import urllib.request
from importlib.metadata import version
from typing import Any

import channel
import xllamacpp


def load(what: channel.Load) -> tuple[channel.Run, dict[str, str]]:
    """Start the server within this process, on a free port of 127.0.0.1."""
    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames, params.port = what.target, ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel, params.warmup = what.length, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = what.threads
    server = xllamacpp.Server(params)

    def generate(command: channel.Command) -> list[list[int]]:
        [prompt] = command.prompts
        body = {
            "prompt": prompt,
            "n_predict": command.tokens,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "cache_prompt": False,
            "ignore_eos": True,
            "return_tokens": True,
        }
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as reply:
            return [json.load(reply)["tokens"]]

    def run(command: channel.Command) -> dict[str, Any]:
        return channel.timed(lambda: generate(command), command)

    return run, {"xllamacpp": version("xllamacpp")}


if __name__ == "__main__":
    channel.serve(load)
