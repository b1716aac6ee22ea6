"""A keeper: a small process that holds the listening socket, and starts the server again when it dies or hangs.

The server itself is the child of the keeper, its worker, which inherits the socket. Over a line of their own the worker says some
times a second how it is. While no worker serves, the keeper answers whoever connects with 503, so nobody waits for a dead
server. When the keeper dies its worker dies, so nothing is left behind. Nothing heavy is imported here: no torch in the keeper.
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
"""What a worker says: it serves; it takes nothing new, but lives; its engine is dead or hangs."""
HEARTBEAT_SECONDS = 0.25
"""Seconds between two words of a worker."""
RESTARTS_FORGIVEN_AFTER = 60.0
"""Seconds a worker must have served for the restarts before it to be forgotten."""
EXIT_GRACE_SECONDS = 5.0
"""Seconds a worker may take to exit after its line has closed."""
REFUSAL_SECONDS = 5.0
"""Seconds a client that is turned away may take to send its request and to read the reply."""
MAX_REFUSED = 512
"""Most clients that are being turned away at once; more are cut without a word."""
SPARE = 32
"""Descriptors kept for the worker to be started."""
PAUSE = 0.5
"""Seconds until the next client is looked at when no descriptor is left."""
FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Reasons for which nobody can be let in now."""
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
    """The worker's end of the line. state: says how the worker is, with one of the three words above."""

    def __init__(self, sock: socket.socket, state: Callable[[], bytes]) -> None:
        self.sock, self.state = sock, state

    async def run(self) -> None:
        """Speak until cancelled. When the keeper is gone this process ends at once, as after kill -9."""
        self.sock.setblocking(False)
        asyncio.get_running_loop().add_reader(self.sock, os.kill, os.getpid(), signal.SIGKILL)
        while True:
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                self.sock.send(self.state())
            await asyncio.sleep(HEARTBEAT_SECONDS)


class Awake:
    """Seconds that this process has seen go by: a time in which it was stopped (Ctrl-Z, a frozen container) does not count.

    Whoever reads `seconds` calls `tick` about every BEAT.
    """

    def __init__(self) -> None:
        self.seconds, self._last = 0.0, monotonic()

    def tick(self) -> None:
        now = monotonic()
        step, self._last = now - self._last, now
        self.seconds += step if step <= 2 * HEARTBEAT_SECONDS else 0.0  # whatever came meanwhile is looked at first


def turned_away() -> int:
    """Most clients to turn away at once, with the descriptors that this process may open."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        return max(1, min(MAX_REFUSED, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE) // 2))
    return MAX_REFUSED


def die_with_parent() -> None:
    """Let the kernel end this process with its parent, where it offers that: a process that hangs reads no line."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)


class Supervisor:
    """Keeps one worker running.

    listener: the listening socket. command: the worker's command line, given the numbers of the descriptors it inherits (the
    listener and its end of the line) and how often a worker has been started again. restarts: how many in a row, without a
    minute of service between them, until the keeper gives up. max_heartbeat_age: seconds without a word after which a worker that
    has served is killed. say: told of every restart.
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
        self._turned: set[asyncio.Task[None]] = set()
        self._most = turned_away()
        self._open = True  # whether the worker takes those who connect

    def run(self) -> int:
        """Until a signal ends the worker, it cannot start, or it dies too often; returns the exit code for this process."""
        return asyncio.run(self._run())

    async def _run(self) -> int:
        for sig in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(sig, self._pass_on, sig)
        self._door(False)
        spent, proven = 0, False
        while True:
            code = await self._life()
            proven = proven or self._served is not None
            if self._ending is not None or not proven:  # a first worker that cannot start has said why
                return code
            lasted = 0.0 if self._served is None else monotonic() - self._served
            spent = 1 if lasted >= RESTARTS_FORGIVEN_AFTER else spent + 1
            if spent > self.restarts:
                self.say(
                    f"the server has ended {spent} times without {RESTARTS_FORGIVEN_AFTER:.0f} s of service between: giving up"
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
        if self._ending is not None:  # it came while there was no process to tell
            process.send_signal(self._ending)
        try:
            if await self._hear(reader):
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

    async def _hear(self, reader: asyncio.StreamReader) -> bool:
        """Listen to a worker. True: it has closed the line and is about to end; False: it is lost and must be ended."""
        heard = asyncio.create_task(reader.read(64))
        clock = Awake()
        while True:
            await asyncio.wait({heard}, timeout=HEARTBEAT_SECONDS)
            clock.tick()
            if not heard.done():
                if self._served is not None and clock.seconds >= self.max_heartbeat_age:
                    heard.cancel()
                    self.say(f"the server has not said a word for {self.max_heartbeat_age:g} s")
                    return False
                continue
            word = heard.result()[-1:]
            clock, heard = Awake(), asyncio.create_task(reader.read(64)) if word else heard
            if not word:
                return True
            if word == LOST:
                heard.cancel()
                self.say("the server's engine is dead or hangs")
                return False
            self._served = self._served or monotonic()
            self._door(word == SERVING and self._ending is None)

    def _pass_on(self, sig: signal.Signals) -> None:
        """A signal to end: the worker gets it, and nobody new is let in."""
        self._ending = sig
        self._door(False)
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(sig)

    # ------------------------------------------------------------------ while nobody serves
    def _door(self, open: bool) -> None:
        """Leave those who connect to the worker, or turn them away."""
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
            if error.errno in FULL:  # nothing has been taken: the listener would wake this process again at once
                loop = asyncio.get_running_loop()
                loop.remove_reader(self.listener)
                loop.call_later(PAUSE, self._look_again)
            return
        if len(self._turned) >= self._most:
            client.close()
            return
        task = asyncio.get_running_loop().create_task(self._turn_away(client))
        self._turned.add(task)
        task.add_done_callback(self._turned.discard)

    async def _turn_away(self, client: socket.socket) -> None:
        """Answer 503 whatever is asked. The rest of the request is read, lest the reply be lost to a reset."""
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
