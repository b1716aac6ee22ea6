"""Somebody who runs a server: started, asked, watched, ended; and everything that keeps it from starting."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from pathlib import Path

from steps import documented, get, journey, need, refused, run, served, words

ASKED = {"model": "pycode", "prompt": "def read_config(path):\n", "max_tokens": 16, "seed": 1}


def starts_and_answers() -> None:
    with served(documented("serve.md", "outrider serve"), "--port 0") as (url, server):
        need(get(f"{url}/ready")[0] == 200, "it said where it is before it was ready")
        status, body = get(f"{url}/v1/completions", ASKED)
        need(status == 200 and json.loads(body)["choices"][0]["text"], f"completion: {status} {body[:200]!r}")
        status, body = get(f"{url}/v1/completions", {**ASKED, "stream": True})
        need(status == 200 and body.rstrip().endswith(b"data: [DONE]"), f"stream: {status} {body[-80:]!r}")
        chat = {"model": "pycode", "messages": [{"role": "user", "content": "x = 1"}], "max_tokens": 8}
        need(get(f"{url}/v1/chat/completions", chat)[0] == 200, "chat")
        status, body = get(f"{url}/v1/completions", {**ASKED, "temprature": 1})
        need(status == 400 and b"temperature" in body, f"an unknown field: {status} {body!r}")
        page = get(f"{url}/")[1]
        need(
            b"<html" in page and b"https://" not in page.replace(b"https://github.com", b""),
            "the page loads something from elsewhere",
        )
        names = {
            line.split("{")[0].split(" ")[0]
            for line in get(f"{url}/metrics")[1].decode().splitlines()
            if line[:1] not in "# "
        }
        need(
            {"vllm:generation_tokens_total", "outrider_spec_decode_rejections_total"} <= names,
            f"metrics: {sorted(names)[:5]}",
        )
        run(f"outrider watch {url} --once").says("Outrider|outrider")
        run(
            f"outrider audit --url {url} --model pycode --target {shipped()} --count 2 --samples 1 --max-tokens 8",
            code=(0, 1, 3),
        )
        port = url.rsplit(":", 1)[1]
        refused(f"outrider serve --port {port}", "choose another")
        server.send_signal(signal.SIGINT)
        assert server.stderr is not None
        said = server.stderr.read()
        need(server.wait(timeout=120) == 0, f"Ctrl-C: exit code {server.returncode}")
        need("ending" in said and "Traceback" not in said, f"Ctrl-C: {said}")


def shipped() -> str:
    return run("""python -c 'from outrider.assets import shipped; print(shipped("target"))'""").out.strip()


def ends_at_once() -> None:
    """The first Ctrl-C waits for an open request and says so; the second ends."""
    with served("outrider serve", "--port 0 --grace 300") as (url, server):
        host, port = url.removeprefix("http://").split(":")
        data = json.dumps({**ASKED, "stream": True, "max_tokens": 1500, "ignore_eos": True, "n": 4}).encode()
        with socket.create_connection((host, int(port))) as sock:
            head = (
                "POST /v1/completions HTTP/1.1",
                f"Host: {host}",
                "Content-Type: application/json",
                f"Content-Length: {len(data)}",
            )
            sock.sendall("\r\n".join([*head, "", ""]).encode() + data)
            while b"data: " not in sock.recv(65536):
                pass
            server.send_signal(signal.SIGINT)
            assert server.stderr is not None
            first = server.stderr.readline()
            need("1 open request may take up to 300 s more" in first, f"the first Ctrl-C said {first!r}")
            server.send_signal(signal.SIGINT)
            need(server.wait(timeout=60) == 130, f"the second Ctrl-C: exit code {server.returncode}")
            rest = server.stderr.read()
            need("Traceback" not in rest, rest)


def interrupted_while_loading() -> None:
    child = subprocess.Popen(words("outrider serve --port 0"), stderr=subprocess.PIPE, text=True)
    time.sleep(1.0)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=120)[1]
    need(child.returncode in (0, 130) and "Traceback" not in said, f"Ctrl-C while it loads: {child.returncode} {said}")


def does_not_start() -> None:
    refused("outrider serve --target ./nosuch", "there is no folder ./nosuch")
    refused("outrider serve --host 0.0.0.0", "set an API key")
    refused("outrider serve --host nosuch.invalid --allow-open", "there is no address|cannot listen")
    refused("outrider serve --api-key-file nosuch", "cannot be read|no such file")
    run("outrider serve --rule nosuch", code=2)
    run("""outrider serve --port 0 --speculative-config '{"method":"mtp","num_speculative_tokens":1}'""", code=2)


def kept() -> None:
    """Runs and alerts of the page's commands."""
    run(documented("serve.md", "outrider dashboards export")).says("alerts.yml")
    need(Path("dashboards/grafana.json").exists() and Path("dashboards/alerts.yml").exists(), "no dashboards")
    line = documented("serve.md", "outrider serve --price-per-hour").replace(
        "https://hooks.example/x", "http://127.0.0.1:9/x"
    )
    with served(line, "--port 0") as (url, _):
        get(f"{url}/v1/completions", ASKED)
        need(b"outrider_cost_dollars_total" in get(f"{url}/metrics")[1], "no cost")
        need(get(f"{url}/outrider/runs")[0] == 200, "no runs")


if __name__ == "__main__":
    journey("server", starts_and_answers, ends_at_once, interrupted_while_loading, does_not_start, kept)
