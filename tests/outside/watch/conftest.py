"""Real servers of others, started for a test and ended with it. `make test-watch` says where their environments are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from outrider.assets import __file__ as assets
from tests.serve.harness import a_port

PYCODE = Path(assets).parent / "pycode"
HERE = Path(__file__).parent
START = float(os.environ.get("WATCH_START_SECONDS", "400"))
"""Seconds that a server may take to start: vLLM's takes 45 on a quiet machine."""


@dataclass
class Server:
    """A server that runs."""

    url: str
    process: subprocess.Popen[bytes]

    def complete(self, prompt: Any, tokens: int, **more: Any) -> dict[str, Any]:
        """A whole completion."""
        return json.loads(self._post({"prompt": prompt, "max_tokens": tokens, **more}))

    def stream(self, prompt: Any, tokens: int, **more: Any) -> tuple[int, int]:
        """A streamed completion: its tokens, and the chunks that had any."""
        body = {"prompt": prompt, "max_tokens": tokens, "stream": True, "return_token_ids": True, **more}
        lines = self._post(body).decode().splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        found = [len(c["choices"][0]["token_ids"]) for c in chunks if c["choices"] and c["choices"][0].get("token_ids")]
        return sum(found), len(found)

    def _post(self, body: dict[str, Any]) -> bytes:
        data = json.dumps({"model": "pycode", **body}).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as reply:
            return reply.read()

    def kill(self) -> None:
        """As kill -9, with all its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(command: list[str], port: int, env: dict[str, str], log: Path) -> Iterator[Server]:
    """A server from its command until the end of the block, ready."""
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **env}, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", process)
    try:
        end = time.monotonic() + START
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            with suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=5) as reply:
                if reply.status == 200:
                    break
            time.sleep(0.5)
        yield server
    finally:
        server.kill()


def python_of(variable: str) -> str:
    found = os.environ.get(variable)
    if not found:
        pytest.skip(f"{variable} names no environment: run `make test-watch`")
    return found


@pytest.fixture
def vllm(tmp_path: Path) -> Callable[..., Any]:
    """Starts vLLM with a speculative_config on a port."""
    python = python_of("WATCH_VLLM")
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    env |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING", "PYTHONPATH": ""}

    def start(config: dict[str, Any], port: int) -> Any:
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(PYCODE / "target")]
        command += ["--served-model-name", "pycode", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
        command += ["--max-model-len", "1024", "--dtype", "bfloat16", "--max-num-seqs", "4"]
        command += ["--per-request-spec-decode-metrics", "detailed", "--speculative-config", json.dumps(config)]
        return running(command, port, env, tmp_path / "vllm.log")

    return start


@pytest.fixture
def llama(tmp_path: Path) -> Callable[..., Any]:
    """Starts llama.cpp's server with a draft on a port."""
    python = python_of("WATCH_LLAMA")

    def start(draft: str, port: int) -> Any:
        command = [python, str(HERE / "llama_server.py"), str(PYCODE / "target"), draft, str(port), str(tmp_path)]
        return running(command, port, {"PYTHONPATH": ""}, tmp_path / "llama.log")

    return start


@pytest.fixture
def port() -> int:
    return a_port()
