"""`outrider serve` from its first line to its last: errors in one sentence, the address when it answers, two kinds of Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outrider.cli.main import main
from outrider.cli.serve import past_of
from outrider.errors import ConfigError
from outrider.serve.address import listen, reserve
from tests.checkpoints import make_checkpoint
from tests.serve.harness import a_port

SERVE = [sys.executable, "-m", "outrider", "serve"]


def test_a_busy_port_is_found_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        code = (
            "import sys\nfrom outrider.cli.main import main\n"
            f"sys.argv = ['outrider', 'serve', '--port', '{port}']\n"
            "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "2 False\n"
        assert f"cannot listen on 127.0.0.1:{port}" in done.stderr and "--port" in done.stderr
        for way in (reserve, listen):
            with pytest.raises(ConfigError, match="choose another --port"):
                way("127.0.0.1", port)
    for way in (reserve, listen):
        with pytest.raises(ConfigError, match="choose another --host"):
            way("no.such.host.invalid", 0)


def test_an_address_that_is_reserved_is_not_open_yet() -> None:
    with reserve("127.0.0.1", 0) as taken:
        place = taken.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(place, timeout=2)
        taken.listen()
        socket.create_connection(place, timeout=2).close()


def test_what_loading_refuses_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2; in this process, which spares one that loads torch (the port above is tried in one of its own)."""
    folder = make_checkpoint(tmp_path / "model", "llama", tokenizer=True)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    monkeypatch.setattr(sys, "argv", ["outrider", "serve", "--target", str(folder), "--port", "0"])
    heard = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)}
    capfd.readouterr()  # what making the model has shown
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:  # a server listens for them, and its process would have ended
        for sig, handler in heard.items():
            signal.signal(sig, handler)
    out, said = capfd.readouterr()
    assert end.value.code == 2 and out == "" and "Traceback" not in said and "http://" not in said
    lines = [line for line in said.splitlines() if "drafting" not in line]
    assert len(lines) == 1 and lines[0].startswith("outrider: ") and "model.safetensors" in lines[0], said


def test_a_store_that_is_not_there_yet_is_empty_and_fills(tmp_path: Path) -> None:
    from outrider.evaluate.store.store import Store

    read = past_of(tmp_path / "runs.db")
    assert read() == {"runs": [], "experiments": []}
    with Store(tmp_path / "runs.db") as db:
        db.begin("bench", "first", {})
    assert [r["name"] for r in read()["runs"]] == ["first"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError):
        past_of(tmp_path / "file" / "runs.db")


@contextmanager
def started(*argv: str) -> Iterator[tuple[subprocess.Popen, list[str]]]:
    """A server in a process of its own, and the lines it says on stderr as they come."""
    said: list[str] = []
    with subprocess.Popen(
        [*SERVE, *argv],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        reader = threading.Thread(target=lambda: said.extend(iter(process.stderr.readline, "")))  # type: ignore[union-attr]
        reader.start()
        try:
            yield process, said
        finally:
            process.kill()
            process.wait()
            reader.join()


def wait_for(process: subprocess.Popen, said: list[str], words: str) -> str:
    from tests.serve.harness import until

    until(lambda: any(words in line for line in said) or process.poll() is not None, 90, lambda: said)
    return next(line for line in said if words in line)


def test_the_address_means_that_it_answers_and_ctrl_c_says_what_it_waits_for() -> None:
    with started("--port", "0", "--grace", "60") as (process, said):
        url = re.search(r"http://\S+", wait_for(process, said, "http://")).group()  # type: ignore[union-attr]
        with urllib.request.urlopen(f"{url}/ready", timeout=10) as reply:
            assert reply.read() == b"ready\n"
        body = {"model": "pycode", "prompt": "x", "max_tokens": 900, "stream": True, "seed": 1, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        stream = urllib.request.urlopen(request, timeout=30)
        stream.readline()
        os.kill(process.pid, signal.SIGSTOP)  # the text does not end before the key is pressed
        process.send_signal(signal.SIGINT)
        os.kill(process.pid, signal.SIGCONT)
        assert "1 open request may take up to 60 s more; Ctrl-C again ends at once" in wait_for(process, said, "ending")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        stream.close()
    assert not any("Traceback" in line or "Error" in line for line in said), said


def test_ctrl_c_without_requests_ends_well() -> None:
    with started("--port", str(a_port())) as (process, said):
        wait_for(process, said, "http://")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert any("no request is open" in line for line in said)
    assert not any("Traceback" in line for line in said), said


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_loads_ends_it(sig: signal.Signals) -> None:
    """The build is held up for ten minutes: nothing but the signal can end it sooner."""
    slow = (
        "import sys, time\nfrom outrider import build\n"
        "def never(*_, **__):\n    print('loading now', file=sys.stderr, flush=True)\n    time.sleep(600)\n"
        "build.build_engine = never\n"
        "from outrider.cli.main import main\nsys.argv = ['outrider', 'serve', '--port', '0']\nmain()\n"
    )
    said: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", slow],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        for line in iter(process.stderr.readline, ""):  # type: ignore[union-attr]
            said.append(line)
            if "loading now" in line:
                process.send_signal(sig)
        assert process.wait(20) == 130
    assert "outrider: interrupted\n" in said and not any("Traceback" in line for line in said), said


def test_a_small_piece_is_sent_at_once() -> None:
    """Tokens are a few bytes each: held back until the one before is acknowledged, the second comes 40 ms late (Nagle, RFC 896)."""

    async def asked() -> int:
        told: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            told.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen("127.0.0.1", 0)
        async with await asyncio.start_server(answer, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await told

    assert asyncio.run(asked())
