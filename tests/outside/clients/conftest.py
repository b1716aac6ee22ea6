"""Servers in processes of their own: one whose model says what a script holds, one of the shipped pair (`make test-clients`)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SERVER = os.environ.get("OUTRIDER_PYTHON", sys.executable)
"""The interpreter that has Outrider; the clients' own need not have it."""
PAIR = str(ROOT / "src" / "outrider" / "assets" / "pycode" / "target")
"""The shipped target."""


@contextmanager
def started(module: str, port_words: Callable[[int], list[str]]) -> Iterator[str]:
    """The URL of a server in a process of its own: `python -m module *port_words(port)`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([SERVER, "-m", module, *port_words(port)], cwd=ROOT, env=env) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            end = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(f"{url}/ready", timeout=2).read()
                    break
                except OSError:
                    assert time.monotonic() < end and process.poll() is None
                    time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait(40)


def scripted_server(name: str, scripts: dict[str, str]) -> AbstractContextManager[str]:
    """A server of the template `name` (`tests/serve/chatserver.py`)."""
    return started("tests.serve.chatserver", lambda port: [str(port), name, json.dumps(scripts)])


CALL = '<tool_call>\n{"name": "look_up", "arguments": {"place": "Bern"}}\n</tool_call>'
SCRIPTS = {
    "weather": f"I ask.\n{CALL}",
    "cold": "It is cold in Bern.",
    "hi": "Hello there!",
    "person": '{"name": "Ada", "age": 36}',
    "ada": '<tool_call>\n{"name": "Person", "arguments": {"name": "Ada", "age": 36}}\n</tool_call>',
}


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    with scripted_server("hermes", SCRIPTS) as found:
        yield found


@pytest.fixture(scope="session")
def pair_url() -> Iterator[str]:
    with started("outrider", lambda port: ["serve", "--port", str(port), "--dtype", "float32"]) as found:
        yield found
