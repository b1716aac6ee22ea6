"""An experiment on the requests of a server by its commands: rehearsed from a file, refused before loading, served and read."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from outrider.cli import live_experiment as command
from outrider.cli.experiment_print import show_live
from outrider.errors import ConfigError
from outrider.evaluate.store.store import Store
from outrider.options import EngineOptions
from tests.evaluate.test_live_experiment import kept
from tests.serve.harness import until


def test_a_rehearsal_from_a_file(tmp_path: Path) -> None:
    """On the shipped pair, as the page on evaluation has it."""
    path = tmp_path / "two.yaml"
    path.write_text("arms:\n  plain: {draft: none}\n  two: {length: 2}\ncount: 8\n")
    name = command.run_rehearsal(path, str(tmp_path / "a.db"), 9, 6, EngineOptions(length=2), 6)
    found = command.document(name, str(tmp_path / "a.db"))
    assert sum(a["requests"] for a in found["arms"]) == 9 and sum(a["units"] for a in found["arms"]) == 6
    with Store(tmp_path / "a.db", read_only=True) as db:
        assert db.run(name).state == "done"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--length", "4"), "--fixed-length"),
        (("--length", "1", "--fixed-length"), "arm 'two': length 2 is more than this server drafts"),
        (("--length", "4", "--fixed-length", "--draft", "ngram"), "arm 'other': draft 'auto' is not loaded"),
    ],
)
def test_the_server_refuses_before_it_loads(
    options: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from outrider.cli.main import app

    path = tmp_path / "e.yaml"
    path.write_text("arms:\n  plain: {draft: none}\n  two: {length: 2}\n  other: {draft: auto}\n")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["serve", "--experiment", str(path), *options])
    assert isinstance(result.exception, ConfigError) and words in str(result.exception)
    assert not (tmp_path / "outrider.db").exists()


@pytest.mark.slow
def test_a_served_experiment_is_read_while_it_runs_and_after_a_signal(tmp_path: Path) -> None:
    path, file = tmp_path / "a.db", tmp_path / "live.yaml"
    file.write_text("arms:\n  plain: {draft: none}\n  two: {length: 2}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command_line = [
        sys.executable,
        "-m",
        "outrider.cli.main",
        "serve",
        "--port",
        str(port),
        "--fixed-length",
        "--length",
        "2",
    ]
    command_line += ["--experiment", str(file), "--store", str(path)]
    with subprocess.Popen(command_line) as process:
        base = f"http://127.0.0.1:{port}"
        body = {"model": "pycode", "prompt": "def f(", "max_tokens": 16}
        until(lambda: answers(base + "/ready"), 90)
        for i in range(8):
            data = json.dumps(body | {"user": f"u{i}"}).encode()
            request = urllib.request.Request(base + "/v1/completions", data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as reply:
                assert reply.headers["x-outrider-arm"] in ("plain", "two")
        until(lambda: len(kept(path)) == 8)
        assert show_live(command.document("live", str(path)), json=True) in (0, 3)
        with pytest.raises(ConfigError, match=f"process {process.pid}"):
            command.end("live", str(path))
        process.terminate()
        assert process.wait(30) == 0
    command.end("live", str(path))
    with Store(path, read_only=True) as db:
        assert db.run("live").state == "done"


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False
