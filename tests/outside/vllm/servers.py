"""vLLM's server in a process of its own, with or without our parts, and the few requests that the tests make of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from benchmarks.vllm_inside import SLOTS
from outrider.assets import shipped
from outrider.integrations.vllm import PLUGINS

READY_SECONDS = 900.0
PARTS = [
    "--scheduler-cls",
    "outrider.integrations.vllm.Scheduler",
    "--worker-cls",
    "outrider.integrations.vllm.CpuWorker",
    "--per-request-spec-decode-metrics",
    "detailed",
]


def environment(plugins: str | None) -> dict[str, str]:
    """vLLM's CPU settings (docs/vllm.md). plugins: VLLM_PLUGINS; None: not set."""
    found = [find_library("tcmalloc_minimal"), str(Path(sys.prefix) / "lib" / "libiomp5.so")]
    own = {
        "LD_PRELOAD": ":".join(p for p in found if p and (not p.startswith("/") or Path(p).exists())),
        "VLLM_CPU_OMP_THREADS_BIND": "0-" + str((os.cpu_count() or 1) - 1),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    out = {**os.environ, **own, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    out.pop("VLLM_PLUGINS", None)
    out.pop("OMP_NUM_THREADS", None)
    return out if plugins is None else {**out, "VLLM_PLUGINS": plugins}


def command(port: int, config: dict[str, Any] | None, more: list[str]) -> list[str]:
    """The server's command line."""
    model = [
        "--model",
        str(shipped("target")),
        "--served-model-name",
        "pycode",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    size = ["--enforce-eager", "--max-model-len", "512", "--max-num-seqs", str(SLOTS), "--no-enable-prefix-caching"]
    drafts = [] if config is None else ["--speculative-config", json.dumps(config)]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *model, *size, *drafts, *more]


class Server:
    """A running server. log: what it printed."""

    def __init__(self, port: int, log: Path) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}", log

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return reply.read()

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def metrics(self) -> dict[str, float]:
        """`/metrics`: value by name and labels."""
        lines = (
            line.rsplit(" ", 1) for line in self.get("/metrics").decode().splitlines() if line[:1] not in ("#", "")
        )
        return {name: float(value) for name, value in lines}

    def settled(self) -> dict[str, Any]:
        """The worker's report once it no longer changes: the endpoint asks for it every second."""
        before = None
        while (now := self.json("/outrider/parts")["report"]) != before:
            before = now
            time.sleep(2.5)
        return now

    def complete(self, prompt: str | list[int], tokens: int = 48, **more: Any) -> dict[str, Any]:
        """One completion: its choice, with the reply's metrics."""
        body = {
            "model": "pycode",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "return_token_ids": True,
            **more,
        }
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + "/v1/completions", data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as reply:
            found = json.loads(reply.read())
        return {**found["choices"][0], "metrics": found.get("metrics")}

    def complete_all(self, prompts: list[Any], **more: Any) -> list[dict[str, Any]]:
        """All of them, as many at a time as the server has slots."""
        with ThreadPoolExecutor(SLOTS) as pool:
            return list(pool.map(lambda p: self.complete(p, **more), prompts))


@contextmanager
def served(
    folder: Path, config: dict[str, Any] | None, *more: str, plugins: str | None = ",".join(PLUGINS)
) -> Iterator[Server]:
    """A server for the shipped target, until the end of the block; its whole process group is ended then."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    log = folder / f"vllm-{port}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command(port, config, list(more)), stdout=out, stderr=out, env=environment(plugins), start_new_session=True
        )
    server = Server(port, log)
    try:
        wait(server, process)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Until it answers. AssertionError with the end of its log if it ends before."""
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            server.get("/health")
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"vLLM did not start:\n{server.log.read_text()[-4000:]}")
