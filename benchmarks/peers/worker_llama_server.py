"""Worker: llama.cpp's server as `peers.py install llama-native` compiles it: a GGUF file, plain or with a draft model, over HTTP.

options: `program`, the server; `libraries`, the folder whose kernels it runs; `length`, the most tokens of a draft (0: plain);
`sampled`: drafts are drawn from the draft's distribution, not its most likely tokens; `repack`: weights may be rearranged at load.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import time
from typing import Any

import channel
import completion

HOST = "127.0.0.1"


def command_line(what: channel.Load, port: int) -> list[str]:
    """How the server is started. One sequence, no cache of earlier prompts."""
    options, threads = what.options, str(what.threads)
    line = [options["program"], "--model", what.target, "--host", HOST, "--port", str(port), "--offline", "--no-ui"]
    line += ["--ctx-size", str(what.length), "--parallel", "1", "--cache-ram", "0", "--no-warmup", "--fit", "off"]
    line += ["--threads", threads, "--threads-batch", threads]
    if not options.get("repack", True):
        line += ["--no-repack"]
    if options.get("length"):
        line += ["--spec-type", "draft-simple", "--model-draft", what.draft, "--threads-draft", threads]
        line += ["--threads-batch-draft", threads, "--spec-draft-n-max", str(options["length"])]
        line += ["--spec-draft-n-min", "0", "--spec-draft-p-min", "0"]
        line += ["--spec-draft-sampling", "probabilistic" if options.get("sampled") else "greedy"]
    return line


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    """Until the model is loaded; an error if the server ends."""
    while process.poll() is None:
        try:
            if _request(port, "GET", "/health")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"llama-server ended with {process.returncode}")


def load(what: channel.Load) -> tuple[channel.Run, dict[str, str]]:
    """Start the server on a free port of this machine."""
    env = os.environ | {"LD_LIBRARY_PATH": what.options["libraries"]}
    version = subprocess.run(
        [what.options["program"], "--version"], env=env, capture_output=True, text=True, check=True
    )
    port = free_port()
    process = subprocess.Popen(command_line(what, port), env=env, stdin=subprocess.DEVNULL)
    wait_for(process, port)

    def post(body: dict[str, Any]) -> dict[str, Any]:
        status, text = _request(port, "POST", "/completion", json.dumps(body))
        if status != 200:
            raise RuntimeError(f"the server answered {status}: {text[:200]!r}")
        return json.loads(text)

    number = re.search(r"version: *(.*)", version.stdout + version.stderr)
    return completion.runner(post), {"llama.cpp": number[1].strip() if number else "unknown"}


def _request(port: int, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(HOST, port, timeout=300)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


if __name__ == "__main__":
    channel.serve(load)
