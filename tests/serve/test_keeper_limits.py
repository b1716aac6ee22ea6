"""The keeper under hardship: stopped for longer than a worker may be silent, and with hardly a descriptor left."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

from outrider.serve.supervisor import HEARTBEAT_SECONDS, Awake, max_refused
from tests.serve.harness import a_port, until
from tests.serve.test_keeper import KEEP, WORKER, keeping, scripted


def test_a_time_in_which_the_keeper_was_stopped_does_not_count() -> None:
    """As Ctrl-Z and `fg` have it: the worker went on, and is not killed for what the keeper did not hear."""
    with scripted(max_heartbeat_age=1.0) as kept:
        worker = kept.worker()
        os.kill(kept.process.pid, signal.SIGSTOP)
        time.sleep(2.0)
        os.kill(kept.process.pid, signal.SIGCONT)
        time.sleep(1.0)
        assert kept.worker() == worker and kept.status() == 200
        kept.process.terminate()
        assert "sent no heartbeat" not in kept.end()[1]


def test_a_worker_that_is_stopped_is_replaced_all_the_same() -> None:
    with scripted(max_heartbeat_age=1.0) as kept:
        worker = kept.worker()
        os.kill(worker, signal.SIGSTOP)
        until(lambda: kept.status() == 200 and kept.worker() != worker)
        kept.process.terminate()
        assert "sent no heartbeat for 1 s" in kept.end()[1]


def test_a_clock_leaves_out_what_it_did_not_see(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("outrider.serve.supervisor.monotonic", lambda: now[0])
    clock = Awake()
    for step in (HEARTBEAT_SECONDS, HEARTBEAT_SECONDS, 100.0, HEARTBEAT_SECONDS):
        now[0] += step
        clock.tick()
    assert clock.seconds == 3 * HEARTBEAT_SECONDS


def test_without_descriptors_the_keeper_rests_and_the_worker_returns() -> None:
    """More silent clients than there are descriptors while the worker starts: it starts, and the keeper does not spin."""
    port = a_port()
    words = [sys.executable, "-c", KEEP, str(port), "20", "5", *WORKER]
    with keeping(["sh", "-c", 'ulimit -n 48; exec "$@"', "sh", *words], port) as kept:
        before = cpu(kept.process.pid)
        os.kill(kept.worker(), signal.SIGKILL)
        held = [socket.create_connection(("127.0.0.1", port), timeout=2) for _ in range(80)]
        until(lambda: kept.status() == 200, 30)
        assert cpu(kept.process.pid) - before < 1.5
        for sock in held:
            sock.close()
        kept.process.terminate()
        assert kept.end()[0] == 0


def cpu(pid: int) -> float:
    """Seconds of processor time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def test_clients_to_turn_away_leave_room_for_a_worker() -> None:
    assert 1 <= max_refused() <= 512
