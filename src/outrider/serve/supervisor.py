"""The supervisor: a small process that holds the listening socket, and restarts the server when it dies or hangs.

The server is the supervisor's child, its worker, which inherits the socket. Over a socket pair the worker sends heartbeats with its
state a few times a second. While no worker serves, the supervisor answers every connection with 503, so that no client waits for a
dead server. When the supervisor dies, its worker dies too. Nothing heavy is imported here: no torch in the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
from collections.abc import Callable
from time import monotonic

SERVING, CLOSED, LOST = b"+", b".", b"-"
"""A worker's heartbeats: it serves; it lives but accepts nothing new; its engine is dead or hangs."""
HEARTBEAT_SECONDS = 0.25
"""Seconds between two heartbeats of a worker."""
RESTARTS_FORGIVEN_AFTER = 60.0
"""After a worker has served this many seconds, the restarts before it no longer count."""
EXIT_GRACE_SECONDS = 15.0
"""Seconds a worker may take to exit after it has closed its socket."""
REFUSAL_SECONDS = 5.0
"""Seconds a refused client may take to send its request and to read the reply."""
MAX_REFUSED = 512
"""Most clients that are being refused at once; more are closed without a reply."""
SPARE = 32
"""Descriptors kept for the worker to be started."""
PAUSE = 0.5
"""Seconds until the next client is accepted when no descriptor is left."""
FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors that mean no connection can be accepted now."""
DEATH_SIGNAL = 1
"""prctl(2): PR_SET_PDEATHSIG."""


def refusal(message: str) -> bytes:
    """A whole reply: 503 in OpenAI's error shape."""
    body = json.dumps({"error": {"message": message, "type": "server_error", "param": None, "code": None}}).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\nRetry-After: 5\r\n"
    )
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


STARTING = refusal("the server is starting: try again in some seconds")
ENDING = refusal("the server is shutting down: send the request again elsewhere")


class Heartbeat:
    """The worker's end of the socket pair. state: returns one of the three heartbeats above."""

    def __init__(self, sock: socket.socket, state: Callable[[], bytes]) -> None:
        self.sock, self.state = sock, state

    async def run(self) -> None:
        """Send heartbeats until cancelled. When the supervisor is gone this process ends at once, as after kill -9."""
        self.sock.setblocking(False)
        asyncio.get_running_loop().add_reader(self.sock, os.kill, os.getpid(), signal.SIGKILL)
        while True:
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                self.sock.send(self.state())
            await asyncio.sleep(HEARTBEAT_SECONDS)


class Awake:
    """Seconds in which this process was running: time in which it was stopped (Ctrl-Z, a frozen container) does not count.

    The user of `seconds` calls `tick` about every HEARTBEAT_SECONDS.
    """

    def __init__(self) -> None:
        self.seconds, self._last = 0.0, monotonic()

    def tick(self) -> None:
        now = monotonic()
        step, self._last = now - self._last, now
        self.seconds += step if step <= 2 * HEARTBEAT_SECONDS else 0.0  # messages that arrived meanwhile are read first


def max_refused() -> int:
    """Most clients to refuse at once, given the descriptors that this process may open."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        return max(1, min(MAX_REFUSED, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE) // 2))
    return MAX_REFUSED


def die_with_parent() -> None:
    """Let the kernel end this process with its parent, if supported: a process that hangs reads no socket."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)


class Supervisor:
    """Keeps one worker running.

    listener: the listening socket. command: the worker's command line, given the descriptors it inherits (the listener and its end
    of the socket pair) and the number of restarts so far. restarts: how many in a row, without a minute of service between them,
    until the supervisor gives up. max_heartbeat_age: seconds without a heartbeat after which a worker that has served is killed.
    say: called with a sentence for every restart.
    """

    def __init__(
        self,
        listener: socket.socket,
        command: Callable[[int, int, int], list[str]],
        restarts: int,
        max_heartbeat_age: float,
        say: Callable[[str], None],
    ) -> None:
        self.listener, self.command, self.restarts, self.max_heartbeat_age, self.say = (
            listener,
            command,
            restarts,
            max_heartbeat_age,
            say,
        )
        self.count = 0
        self._ending: signal.Signals | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._served: float | None = None  # since when the present worker has served
        self._refused: set[asyncio.Task[None]] = set()
        self._most = max_refused()
        self._open = True  # whether the worker accepts connections

    def run(self) -> int:
        """Run until a signal ends the worker, it cannot start, or it dies too often; returns this process's exit code."""
        return asyncio.run(self._run())

    async def _run(self) -> int:
        for sig in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(sig, self._pass_on, sig)
        self._door(False)
        spent, proven = 0, False
        while True:
            code = await self._life()
            proven = proven or self._served is not None
            if self._ending is not None or not proven:  # a first worker that cannot start has printed the reason
                return code
            lasted = 0.0 if self._served is None else monotonic() - self._served
            spent = 1 if lasted >= RESTARTS_FORGIVEN_AFTER else spent + 1
            if spent > self.restarts:
                self.say(
                    f"the server has ended {spent} times without {RESTARTS_FORGIVEN_AFTER:.0f} s of service in between: giving up"
                )
                return code or 1
            self.count += 1
            self.say(f"the server has ended (exit code {code}): starting it again, number {self.count}")

    async def _life(self) -> int:
        """One worker from its start to its end; returns its exit code."""
        ours, theirs = socket.socketpair()
        passed = (self.listener.fileno(), theirs.fileno())
        self._served = None
        command = self.command(*passed, self.count)
        process = await asyncio.create_subprocess_exec(*command, pass_fds=passed, process_group=0)
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        self._process = process
        if self._ending is not None:  # the signal came while there was no process
            process.send_signal(self._ending)
        try:
            if await self._read_heartbeats(reader):
                await asyncio.wait_for(process.wait(), EXIT_GRACE_SECONDS)
        except TimeoutError:
            pass
        finally:
            self._door(False)
            if process.returncode is None:
                process.kill()
            code = await process.wait()
            writer.close()
        return code if code >= 0 else 128 - code

    async def _read_heartbeats(self, reader: asyncio.StreamReader) -> bool:
        """Read a worker's heartbeats. True: it has closed its socket and is about to exit; False: it is lost and must be killed."""
        incoming = asyncio.create_task(reader.read(64))
        clock = Awake()
        while True:
            await asyncio.wait({incoming}, timeout=HEARTBEAT_SECONDS)
            clock.tick()
            if not incoming.done():
                if self._served is not None and clock.seconds >= self.max_heartbeat_age:
                    incoming.cancel()
                    self.say(f"the server has sent no heartbeat for {self.max_heartbeat_age:g} s")
                    return False
                continue
            word = incoming.result()[-1:]
            clock, incoming = Awake(), asyncio.create_task(reader.read(64)) if word else incoming
            if not word:
                return True
            if word == LOST:
                incoming.cancel()
                self.say("the server's engine is dead or hangs")
                return False
            self._served = self._served or monotonic()
            self._door(word == SERVING and self._ending is None)

    def _pass_on(self, sig: signal.Signals) -> None:
        """Pass a signal to end on to the worker, and accept no new connections."""
        self._ending = sig
        self._door(False)
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(sig)

    # ------------------------------------------------------------------ while nobody serves
    def _door(self, open: bool) -> None:
        """Leave new connections to the worker, or refuse them here."""
        loop, self._open = asyncio.get_running_loop(), open
        if open:
            loop.remove_reader(self.listener)
        else:
            loop.add_reader(self.listener, self._accept)

    def _look_again(self) -> None:
        if not self._open:
            self._door(False)

    def _accept(self) -> None:
        try:
            client, _ = self.listener.accept()
        except OSError as error:  # the worker was faster, or the client has gone
            if error.errno in FULL:  # nothing was accepted: the listener would wake this process again at once
                loop = asyncio.get_running_loop()
                loop.remove_reader(self.listener)
                loop.call_later(PAUSE, self._look_again)
            return
        if len(self._refused) >= self._most:
            client.close()
            return
        task = asyncio.get_running_loop().create_task(self._refuse(client))
        self._refused.add(task)
        task.add_done_callback(self._refused.discard)

    async def _refuse(self, client: socket.socket) -> None:
        """Answer 503 to every request. The rest of the request is read, so that a reset does not discard the reply."""
        client.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=client)
        try:
            async with asyncio.timeout(REFUSAL_SECONDS):
                await reader.read(65536)
                writer.write(STARTING if self._ending is None else ENDING)
                writer.write_eof()
                while await reader.read(65536):
                    pass
        except (OSError, TimeoutError):
            pass
        finally:
            writer.close()
