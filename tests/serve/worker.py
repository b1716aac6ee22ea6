"""A worker without an engine, for a keeper under test: answers with its process id; what is asked for makes it fail.

Run as a program with the numbers a keeper gives: the listener, the line, how often it has been started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time

from outrider.serve.supervisor import CLOSED, LOST, SERVING, Heartbeat, die_with_parent


class Worker:
    """GET /: the process id. /slow: the same, later. /hang, /lost: hangs; says that its engine is lost."""

    def __init__(self, listener: int, line: int, again: int) -> None:
        self.listener, self.line, self.again = socket.socket(fileno=listener), socket.socket(fileno=line), again
        self.word, self.ended, self.open = SERVING, asyncio.Event(), 0

    async def run(self) -> None:
        server = await asyncio.start_server(self.answer, sock=self.listener)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.drain)
        telling = asyncio.create_task(Heartbeat(self.line, lambda: self.word).run())
        await self.ended.wait()
        server.close()
        while self.open:
            await asyncio.sleep(0.01)
        telling.cancel()

    def drain(self) -> None:
        self.word = CLOSED
        self.ended.set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
            if path == b"/hang":
                time.sleep(60)
            if path == b"/slow":
                await asyncio.sleep(0.6)
            self.word = LOST if path == b"/lost" else self.word
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n%d %d" % (os.getpid(), self.again))
            await writer.drain()
        writer.close()
        self.open -= 1


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(Worker(*map(int, sys.argv[1:])).run())
