"""The keeper: a server that is killed, hangs or gives up is there again, clients are told at once, and nothing is left behind.

Most tests keep a worker without an engine (`worker.py`), so that a start takes a fraction of a second; the last one keeps
`outrider serve` itself (`test_serve_command.py` has one such in every run).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from outrider.build import build_engine
from outrider.params import SamplingParams
from tests.serve.harness import a_port, until

KEEP = """
import sys
from outrider.serve.address import listen
from outrider.serve.supervisor import Supervisor
port, restarts, silence, *worker = sys.argv[1:]
say = lambda text: print(text, file=sys.stderr, flush=True)
keeper = Supervisor(listen("127.0.0.1", int(port)), lambda *n: [*worker, *map(str, n)], int(restarts), float(silence), say)
code = keeper.run()
assert "torch" not in sys.modules
sys.exit(code)
"""
WORKER = [sys.executable, str(Path(__file__).with_name("worker.py"))]


@dataclass
class Kept:
    """A keeper's process and the port it keeps."""

    process: subprocess.Popen[str]
    port: int

    def ask(self, path: str = "/", body: Any = None, seconds: float = 5.0) -> tuple[int, bytes]:
        """Status and body of a reply. OSError: the connection was cut or refused, or nothing came for `seconds`."""
        data = b"" if body is None else json.dumps(body).encode()
        kind = "" if body is None else f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        head = (
            f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{kind}\r\n"
        )
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as sock:
            sock.sendall(head.encode() + data)
            answer = b""
            while part := sock.recv(65536):
                answer += part
        if b"\r\n\r\n" not in answer:
            raise ConnectionResetError("closed without a reply")
        top, _, rest = answer.partition(b"\r\n\r\n")
        return int(top.split()[1]), rest

    def status(self) -> int:
        """Of /ready; 0 if there is no reply."""
        try:
            return self.ask("/ready")[0]
        except OSError:
            return 0

    def worker(self) -> int:
        """Process id of the worker."""
        file = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(file.read_text().split()[0])

    def end(self) -> tuple[int, str]:
        """Exit code and what was said."""
        said = self.process.communicate(timeout=40)[1]
        return self.process.returncode, said


@contextmanager
def keeping(command: list[str], port: int) -> Iterator[Kept]:
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        kept = Kept(process, port)
        try:
            until(lambda: kept.status() == 200 or process.poll() is not None, 120)
            yield kept
        finally:
            process.kill()


def scripted(restarts: int = 20, max_heartbeat_age: float = 5.0, worker: list[str] | None = None) -> Any:
    port = a_port()
    return keeping(
        [sys.executable, "-c", KEEP, str(port), str(restarts), str(max_heartbeat_age), *(worker or WORKER)], port
    )


def gone(pid: int) -> bool:
    """No such process, or one that is only waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_a_killed_worker_is_replaced_and_its_clients_are_told_at_once() -> None:
    """Four clients ask without pause through five kills: nobody waits a second, and who is not served is told 503 or cut off."""
    with scripted() as kept:
        seen, longest, stop = list[int](), [0.0], threading.Event()

        def client() -> None:
            while not stop.is_set():
                start = time.monotonic()
                try:
                    seen.append(kept.ask(seconds=10)[0])
                except OSError:
                    seen.append(0)
                longest[0] = max(longest[0], time.monotonic() - start)

        clients = [threading.Thread(target=client) for _ in range(4)]
        for thread in clients:
            thread.start()
        pids = [kept.worker()]
        for again in range(1, 6):
            os.kill(pids[-1], signal.SIGKILL)
            until(lambda again=again: (r := kept.ask("/"))[0] == 200 and int(r[1].split()[1]) == again, 20)
            pids.append(kept.worker())
        stop.set()
        for thread in clients:
            thread.join()
        assert len(set(pids)) == 6 and all(gone(pid) for pid in pids[:-1])
        assert set(seen) <= {200, 503, 0} and {200, 503} <= set(seen)
        assert longest[0] < 5


@pytest.mark.parametrize(("path", "said"), [("/hang", "sent no heartbeat"), ("/lost", "dead or hangs")])
def test_a_worker_that_hangs_or_gives_up_is_replaced(path: str, said: str) -> None:
    with scripted(max_heartbeat_age=0.8) as kept:
        first = kept.worker()
        with pytest.raises(OSError) if path == "/hang" else nullcontext():
            kept.ask(path, seconds=10)
        until(lambda: gone(first) and kept.status() == 200)
        kept.process.terminate()
        code, text = kept.end()
        assert code == 0 and said in text and "number 1" in text


def test_a_worker_that_dies_again_and_again_is_given_up() -> None:
    with scripted(restarts=2) as kept:
        for again in range(3):
            until(lambda again=again: kept.status() == 200)
            os.kill(kept.worker(), signal.SIGKILL)
            until(lambda: kept.process.poll() is not None or kept.status() in (0, 503))
            until(lambda: kept.process.poll() is not None or kept.status() == 200)
        code, text = kept.end()
        assert code == 137 and "giving up" in text and "number 2" in text and "number 3" not in text


def test_a_worker_that_cannot_start_is_not_started_again() -> None:
    with scripted(worker=[sys.executable, "-c", "raise SystemExit(2)"]) as kept:
        code, text = kept.end()
        assert code == 2 and "again" not in text


def test_a_signal_is_passed_on_and_what_runs_is_finished() -> None:
    """A newcomer is told that the server ends; one that comes as its port changes hands may find it closed."""

    def told() -> bool:
        try:
            return b"shutting down" in kept.ask()[1]
        except ConnectionError:
            return False

    with scripted() as kept:
        replies: list[tuple[int, bytes]] = []
        slow = threading.Thread(target=lambda: replies.append(kept.ask("/slow")))
        slow.start()
        time.sleep(0.2)
        worker = kept.worker()
        kept.process.terminate()
        until(told)
        slow.join()
        code, text = kept.end()
        assert replies[0][0] == 200 and code == 0 and gone(worker) and not text


def test_a_worker_that_ends_by_itself_drains_and_is_replaced() -> None:
    """A signal to the worker alone: it finishes what runs, newcomers are told 503, and the next worker serves."""
    with scripted() as kept:
        replies: list[tuple[int, bytes]] = []
        slow = threading.Thread(target=lambda: replies.append(kept.ask("/slow")))
        slow.start()
        time.sleep(0.2)
        first = kept.worker()
        os.kill(first, signal.SIGTERM)
        until(lambda: kept.status() == 503)
        slow.join()
        until(lambda: kept.status() == 200)
        assert replies[0] == (200, b"%d 0" % first) and gone(first)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_keeper_leaves_nothing_behind(stopped: bool) -> None:
    """Neither does a worker that is stopped, which can hear nothing: the kernel ends it."""
    with scripted() as kept:
        worker = kept.worker()
        if stopped:
            os.kill(worker, signal.SIGSTOP)
        kept.process.kill()
        until(lambda: gone(worker))
        with pytest.raises(OSError):
            kept.ask()


# ---------------------------------------------------------------------- the real server
BODY = {"model": "pycode", "max_tokens": 24, "ignore_eos": True}
PROMPTS = ("def f(", "import ", "class Node:\n    def ", "x = [", "for i in range(")


def plain_texts(seeds: int) -> dict[tuple[str, int], str]:
    """What a plain run writes for each prompt and seed: the coupling of `match` makes a seed fix the text."""
    engine = build_engine(draft="none", rule="match", slots=8)
    keys = [(prompt, seed) for prompt in PROMPTS for seed in range(seeds)]
    params = [SamplingParams(max_tokens=24, ignore_eos=True, seed=seed) for _, seed in keys]
    found = engine.generate([prompt for prompt, _ in keys], params)
    return {key: result.text for key, result in zip(keys, found, strict=True)}


@dataclass
class Load:
    """Clients that ask without pause. broken: seconds until each request that was not served ended; wrong: texts that differ."""

    kept: Kept
    expected: dict[tuple[str, int], str]
    served: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    broken: list[tuple[float, float]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, prompt: str, seed: int) -> bool:
        status, reply = self.kept.ask("/v1/completions", {**BODY, "prompt": prompt, "seed": seed}, 60)
        if status == 200:
            self.served.append(time.monotonic())
            text = json.loads(reply)["choices"][0]["text"]
            if text != self.expected[prompt, seed]:
                self.wrong.append(text)
        return status == 200

    def client(self, number: int) -> None:
        keys = list(self.expected)
        while not self.stop.is_set():
            number += 1
            start = time.monotonic()
            try:
                good = self.ask(*keys[number % len(keys)])
            except (OSError, ValueError):  # cut off, before or within a reply
                good = False
            if not good:
                self.broken.append((start, time.monotonic()))
                time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kills", [50])
def test_kill_9_under_load(kills: int) -> None:
    """T20: clients hear of it within 5 s, the server is ready again within its load time + 5 s, and its first texts are exact."""
    port = a_port()
    command = [
        sys.executable,
        "-m",
        "outrider.cli.main",
        "serve",
        "--port",
        str(port),
        "--rule",
        "match",
        "--slots",
        "4",
    ]
    began = time.monotonic()
    with keeping([*command, "--restarts", str(kills)], port) as kept:
        load_seconds = time.monotonic() - began
        load, back, heard = Load(kept, plain_texts(4)), list[float](), list[float]()
        for kill in range(kills):
            load.stop.clear()
            clients = [threading.Thread(target=load.client, args=(5 * i,)) for i in range(4)]
            for thread in clients:
                thread.start()
            time.sleep(0.4 + 0.03 * kill)
            at = time.monotonic()
            os.kill(kept.worker(), signal.SIGKILL)
            until(lambda: kept.status() != 200)
            until(lambda: kept.status() == 200, 120)
            back.append(time.monotonic() - at)
            load.stop.set()
            for thread in clients:
                thread.join()
            heard += [end - max(start, at) for start, end in load.broken if end > at]
        before = len(load.served)
        assert all(load.ask(*key) for key in list(load.expected) * 5)
        kept.process.terminate()
        assert kept.end()[0] == 0
    print(
        f"\nT20: {kills} kills, load {load_seconds:.1f} s; ready again after median {statistics.median(back):.1f} s, "
        f"at most {max(back):.1f} s; {len(heard)} requests not served, told within {max(heard):.2f} s; "
        f"{len(load.served)} texts ({len(load.served) - before} after the last restart), {len(load.wrong)} wrong"
    )
    assert not load.wrong and max(heard) < 5 and max(back) < load_seconds + 5
