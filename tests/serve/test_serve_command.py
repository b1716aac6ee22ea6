"""`outrider serve` refuses what is unsafe before anything is loaded; `outrider dashboards` writes files that promtool accepts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from outrider.build import build_engine
from outrider.cli.main import app
from outrider.errors import ConfigError
from outrider.serve.address import check_address, is_loopback
from outrider.serve.app import create_app
from outrider.serve.settings import Settings, digest
from tests.serve.harness import a_port, until

RUN = CliRunner()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_public_address_needs_a_key_or_a_word(host: str) -> None:
    with pytest.raises(ConfigError, match="OUTRIDER_API_KEY"):
        check_address(host, (), False)
    check_address(host, (digest("a-long-key"),), False)
    check_address(host, (), True)
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost", "127.9.9.9"])
def test_loopback_needs_nothing(host: str) -> None:
    check_address(host, (), False)


def test_the_command_refuses_before_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUTRIDER_API_KEY", raising=False)
    for arguments in (["--host", "0.0.0.0"], ["--api-key", "short"], ["--api-key-file", "/nowhere/keys"]):
        result = RUN.invoke(app, ["serve", *arguments])
        assert isinstance(result.exception, ConfigError)


def test_one_command_serves_the_shipped_pair_survives_kill_9_and_ends_on_sigterm() -> None:
    port = a_port()

    def ask(path: str, body: bytes | None = None) -> bytes:
        """A reply; nothing if it is an error or none comes."""
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.read()
        except OSError:
            return b""

    def worker() -> int:
        return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])

    command = [sys.executable, "-m", "outrider.cli.main", "serve", "--port", str(port), "--restarts", "1"]
    body = json.dumps({"model": "pycode", "prompt": "def f(", "max_tokens": 5, "seed": 1}).encode()
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        until(lambda: ask("/ready") == b"ready\n", 60)
        text = json.loads(ask("/v1/completions", body))["choices"][0]["text"]
        os.kill(worker(), signal.SIGKILL)
        until(lambda: ask("/ready") == b"")
        until(lambda: ask("/ready") == b"ready\n", 60)
        assert json.loads(ask("/v1/completions", body))["choices"][0]["text"] == text
        assert b'outrider_restarts_total{model_name="pycode"} 1.0' in ask("/metrics")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_one_command_serves_replicas_behind_one_address() -> None:
    port, body = a_port(), json.dumps({"model": "pycode", "prompt": "def f(", "max_tokens": 5, "seed": 1}).encode()
    command = [sys.executable, "-m", "outrider.cli.main", "serve", "--port", str(port), "--replicas", "1"]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # to its end, if it ends
        said = next((line for line in process.stderr if f"http://127.0.0.1:{port}" in line), "")
        assert said and process.poll() is None
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert json.loads(reply.read())["usage"]["completion_tokens"] == 5
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_exported_files_name_metrics_that_exist(tmp_path: Path) -> None:
    result = RUN.invoke(app, ["dashboards", "export", str(tmp_path), "--json"])
    assert result.exit_code == 0
    files = {Path(f).name for f in json.loads(result.stdout)["files"]}
    assert files == {"alerts.yml", "alerts.test.yml", "grafana.json"}
    metrics = create_app(build_engine, Settings("m", price=1.0)).state.bridge.metrics
    metrics.counts.add(2, 1, 2, 0.5, 0.2, 0.0)
    metrics.refused["Overloaded"] += 1
    metrics.responses["/", "200"] += 1
    for name in ("length", "speedup_ratio_estimate", "break_even_rejection_probability"):
        metrics.gauges[f"spec_decode_{name}"] = ("text", lambda: 1.0)  # the controller's, once there is an engine
    for name, (text, _) in list(metrics.gauges.items()):
        metrics.gauges[name] = (text, lambda: 1.0)
    known = set(re.findall(r"^([a-z_:]+)", metrics.text().decode(), re.MULTILINE))
    for file in ("alerts.yml", "grafana.json"):
        text = (tmp_path / file).read_text()
        used = set(re.findall(r"(?<![a-z_:])((?:outrider_|vllm:)[a-z_]+)", text)) - {"outrider_rejection_probability"}
        assert used <= known, used - known
    assert json.loads((tmp_path / "grafana.json").read_text())["uid"] == "outrider-serve"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian package prometheus) is not installed")
def test_promtool_accepts_rules_and_sees_alerts_fire_and_clear(tmp_path: Path) -> None:
    RUN.invoke(app, ["dashboards", "export", str(tmp_path)])
    for arguments in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts.test.yml"]):
        subprocess.run(["promtool", *arguments], cwd=tmp_path, check=True, capture_output=True)
