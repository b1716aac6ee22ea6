"""Work of a client's size beside the server: in processes that are ended when a job takes too long, and started again.

Short texts are read at once, where the request is; a process has what may be long or may never end: long texts, every text of a
tokenizer whose expressions may loop (`wild`), chat templates, and grammars that were never compiled before. Texts and grammars have
processes of their own, so neither waits for the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec
from math import inf
from time import monotonic
from typing import Any

from outrider.automata import core_of
from outrider.errors import ConfigError, RequestError
from outrider.serve.expressions import wild
from outrider.serve.prep_worker import Refused, packed
from outrider.serve.tickets import Unavailable

SHORT = 4096
"""Characters of a request that are read at once: some milliseconds."""
GRAMMAR_SECONDS, TEXT_SECONDS = 2.0, 10.0
"""Seconds a client's grammar may take to compile, and its text or conversation to be read."""
WAIT_SECONDS = 10.0
"""Seconds a job may wait for a process."""
START_SECONDS = 60.0
"""Seconds a process may take to start and to load its tokenizer."""
MEMORY = 1 << 30
"""Bytes of its own that a process may have."""
AGAIN_SECONDS = 60.0
"""Seconds after which a grammar that was given up is tried again."""
KEPT = 1024
"""Grammars of which it is known whether they can be compiled."""
ANSWER = 64 << 20
"""Largest answer of a process, bytes."""


class Ended(Exception):
    """The process that had the job was ended. late: by its clock; otherwise it asked for too much memory, or failed."""

    def __init__(self, late: bool) -> None:
        super().__init__(late)
        self.late = late


class Unfit(Exception):
    """No process can be made for this tokenizer."""


class Process:
    """One process: takes a job at a time."""

    def __init__(self, hello: dict[str, Any]) -> None:
        self._hello = hello
        self._process: asyncio.subprocess.Process | None = None

    async def do(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer. Raises Ended; the next job then starts another process. Raises Unavailable if none can be started."""
        begun = 0.0
        try:
            if self._process is None or self._process.returncode is not None:
                await self._start()
            begun = monotonic()
            async with asyncio.timeout(seconds + 1.0):
                return await self._ask({**job, "seconds": seconds})
        except (TimeoutError, OSError, asyncio.IncompleteReadError, ValueError):
            await self.end()
            if not begun:  # no fault of the job
                raise Unavailable(
                    "no process for long prompts and grammars could be started: try again later"
                ) from None
            raise Ended(monotonic() - begun >= seconds) from None
        except asyncio.CancelledError:
            await self.end()
            raise

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # no module of the folder that the server was started in
            "-m",
            "outrider.serve.prep_worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            process_group=0,  # a signal of the terminal is for the server, which lets requests finish
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        async with asyncio.timeout(START_SECONDS + 1.0):
            if "failed" in await self._ask({**self._hello, "memory": MEMORY, "seconds": START_SECONDS}):
                await self.end()
                raise Unfit

    @property
    def _stdin(self) -> asyncio.StreamWriter:
        assert self._process is not None and self._process.stdin is not None
        return self._process.stdin

    async def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        self._stdin.write(packed(job))
        await self._stdin.drain()
        size = int.from_bytes(await self._process.stdout.readexactly(4))
        if size > ANSWER:
            raise ValueError("an answer is too large")
        return json.loads(await self._process.stdout.readexactly(size))

    async def end(self) -> None:
        """End it now, whatever it does."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        if (
            process.stdout is not None and process.stdout.at_eof()
        ):  # it ends by itself; to kill it now would take asyncio's
            with contextlib.suppress(TimeoutError):  # news of it away, which then says so in the log
                await asyncio.wait_for(process.wait(), 1.0)
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()


class Pool:
    """So many processes at most, each started when it is first needed. hello: what they are told first. share: most that one
    client (API key) may have at a time; its further jobs wait behind its own, and not before others'."""

    def __init__(self, most: int, hello: Callable[[], dict[str, Any]], share: int) -> None:
        self._hello, self._share = hello, share
        self._turns: dict[int, asyncio.Semaphore] = {}
        self._idle: list[Process] = []
        self._free = asyncio.Semaphore(most)
        self._tasks: set[asyncio.Task[Any]] = set()

    async def do(self, job: dict[str, Any], seconds: float, owner: int) -> dict[str, Any]:
        """The answer to a job of a client; one whose client goes away is finished all the same, since its process is busy with it.

        Raises Unavailable if no process is free in time, Ended if the job was given up, Unfit if there can be none.
        """
        turn = self._turns.setdefault(owner, asyncio.Semaphore(self._share))
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await turn.acquire()
                try:
                    await self._free.acquire()
                except BaseException:
                    turn.release()
                    raise
        except TimeoutError:
            raise Unavailable("other long prompts or grammars are being read: try again later") from None
        task = asyncio.get_running_loop().create_task(self._run(job, seconds, turn))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    async def _run(self, job: dict[str, Any], seconds: float, turn: asyncio.Semaphore) -> dict[str, Any]:
        try:
            process = self._idle.pop() if self._idle else Process(await asyncio.to_thread(self._hello))
            try:
                return await process.do(job, seconds)
            finally:
                self._idle.append(process)
        finally:
            self._free.release()
            turn.release()

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it was told to whoever asked, if anybody still listens

    async def close(self) -> None:
        """End all of them."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for process in self._idle:
            await process.end()


class Prep:
    """Clients' texts and grammars, read for one server. tokenizer, eos: the engine's; most: tokens that a prompt may have.
    shared: several clients share it (an owner is the number of an API key)."""

    def __init__(self, tokenizer: Any, eos: tuple[int, ...], most: int, shared: bool = False) -> None:
        self.most = most
        core = core_of(tokenizer)
        self._folder = folder_of(tokenizer)
        self.compiles = core is not None and find_spec("llguidance") is not None
        self._reads = self._folder is not None or (core is not None and not getattr(tokenizer, "chat_template", None))
        self.wild, writing = (False, False) if core is None else wild(core)
        if writing:  # every token of every text goes through it, in the engine's thread
            raise ConfigError(
                "the decoder in the target's tokenizer.json may take for ever or write without bound: use another tokenizer"
            )
        texts = lambda: {"folder": self._folder} if self._folder else {"core": core_of(tokenizer)}  # noqa: E731
        grammars = lambda: {"grammar": core_of(tokenizer), "eos": list(eos)}  # noqa: E731
        self._texts, self.grammars = (Pool(2, hello, 1 if shared else 2) for hello in (texts, grammars))
        self._known: OrderedDict[bytes, tuple[str, float]] = OrderedDict()  # digest of a grammar: see `_tried`

    def in_thread(self, characters: int, template: bool) -> bool:
        """Whether so much text goes to a process. Never where none can be told of the tokenizer (it is no file's)."""
        return self._reads and (template or self.wild or characters > SHORT)

    async def encode(self, texts: list[str], special: bool, most: int, owner: int = 0) -> list[list[int]]:
        """Ids of texts, in a process. RequestError for one of more than `most` tokens, or that is not read in time."""
        return await self._ids({"do": "encode", "texts": texts, "special": special, "most": most}, owner)

    async def chat(self, messages: list[dict[str, Any]], special: bool, owner: int = 0) -> list[int]:
        """Ids of a conversation by the model's template, in a process."""
        job = {"do": "chat", "messages": messages, "special": special, "most": self.most}
        return (await self._ids(job, owner))[0]

    async def _ids(self, job: dict[str, Any], owner: int) -> list[list[int]]:
        try:
            answer = await self._texts.do(job, TEXT_SECONDS, owner)
        except Ended as error:
            if error.late:
                raise RequestError(
                    f"the prompt could not be read within {TEXT_SECONDS:g} seconds: make it shorter"
                ) from None
            raise RequestError(
                f"the prompt could not be read, as it needs more than {MEMORY >> 20} MiB or this model's tokenizer fails on it: "
                "change it, or send token ids"
            ) from None
        except Unfit:
            raise RequestError("the prompt cannot be read by this model's tokenizer: send token ids") from None
        if "long" in answer:
            raise TooLong(answer["long"], job["most"])
        if "bad" in answer:
            raise Refused(answer["bad"])
        if "failed" in answer:
            raise RequestError("the prompt cannot be read by this model's tokenizer")
        return answer["ids"]

    async def try_grammar(self, text: str, owner: int = 0) -> None:
        """Compile a grammar in a process unless it is known. RequestError for a bad one and for one that is not done in time."""
        if not self.compiles:
            return  # the engine says so itself
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        if key not in self._known or self._known[key][1] < monotonic():
            self._known[key] = await self._tried(text, owner)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        why = self._known[key][0]
        if why:
            raise RequestError(why)

    async def _tried(self, text: str, owner: int) -> tuple[str, float]:
        """Why a grammar is refused, or an empty string, and until when that is known: what a busy machine did not do in time it may
        do later."""
        try:
            answer = await self.grammars.do({"do": "grammar", "text": text}, GRAMMAR_SECONDS, owner)
        except Unfit:
            return "structured output is not possible with this model's tokenizer", inf
        except Ended as error:
            how = f" within {GRAMMAR_SECONDS:g} seconds" if error.late else f", or needs more than {MEMORY >> 20} MiB"
            return f"the grammar cannot be compiled{how}: make it simpler", monotonic() + AGAIN_SECONDS
        if "failed" in answer:
            return f"the grammar cannot be compiled ({answer['failed']}): make it simpler", inf
        return answer.get("bad", ""), inf

    async def close(self) -> None:
        """End the processes."""
        await self._texts.close()
        await self.grammars.close()


class TooLong(RequestError):
    """A text of more tokens than there may be."""

    def __init__(self, tokens: int, most: int) -> None:
        super().__init__(
            f"the prompt has {tokens} tokens and the context holds {most + 1}: shorten it to at most {most}"
        )
        self.tokens = tokens


def folder_of(tokenizer: Any) -> str | None:
    """The folder that transformers has read this tokenizer from; None if there is none."""
    folder = getattr(tokenizer, "name_or_path", None)
    return str(folder) if folder and os.path.isfile(os.path.join(folder, "tokenizer.json")) else None
