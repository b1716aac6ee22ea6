"""Work whose cost a client controls, in processes that are killed when a job takes too long, and started again.

Short texts are read in the server. Work that may be long or may never end goes to a process: long texts, every text of a tokenizer
with risky expressions (`wild`), chat templates, and grammars that were not compiled before. Texts and grammars have separate
processes, so neither waits for the other.
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
from outrider.dialects.detect import Dialect
from outrider.errors import ConfigError, RequestError
from outrider.serve.expressions import wild
from outrider.serve.prep_worker import Refused, packed
from outrider.serve.tickets import Unavailable

SHORT = 4096
"""Up to this many characters of a request are read in the server: it takes some milliseconds."""
GRAMMAR_SECONDS, TEXT_SECONDS = 2.0, 10.0
"""Time limits for compiling a client's grammar, and for reading its text or conversation."""
WAIT_SECONDS = 10.0
"""Seconds a job may wait for a process."""
START_SECONDS = 60.0
"""Seconds a process may take to start and to load its tokenizer."""
MEMORY = 1 << 30
"""Limit of a process's own memory, bytes."""
AGAIN_SECONDS = 60.0
"""Seconds after which a grammar that was abandoned may be tried again."""
KEPT = 1024
"""Grammars for which the result of compiling is remembered."""
ANSWER = 64 << 20
"""Largest answer of a process, bytes."""


class Ended(Exception):
    """The process with the job has ended. late: it exceeded its time; otherwise it needed too much memory, or failed."""

    def __init__(self, late: bool) -> None:
        super().__init__(late)
        self.late = late


class Unfit(Exception):
    """No process can be started for this tokenizer."""


class Process:
    """One process, which does one job at a time."""

    def __init__(self, hello: dict[str, Any]) -> None:
        self._hello = hello
        self._process: asyncio.subprocess.Process | None = None

    async def do(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to a job. Raises Ended, and the next job then starts another process; Unavailable if none can be started."""
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
            "-P",  # import no module from the working folder
            "-m",
            "outrider.serve.prep_worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            process_group=0,  # a signal from the terminal goes to the server alone, which lets requests finish
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
        """End it now."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        if process.stdout is not None and process.stdout.at_eof():  # it is ending by itself; killing it now would make
            with contextlib.suppress(TimeoutError):  # asyncio log a warning about an unknown child process
                await asyncio.wait_for(process.wait(), 1.0)
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()


class Pool:
    """At most `most` processes, each started when it is first needed. hello: their first message. share: most that one client
    (API key) may use at a time; its further jobs wait for its own, and do not delay others'."""

    def __init__(self, most: int, hello: Callable[[], dict[str, Any]], share: int) -> None:
        self._hello, self._share = hello, share
        self._turns: dict[int, asyncio.Semaphore] = {}
        self._idle: list[Process] = []
        self._free = asyncio.Semaphore(most)
        self._tasks: set[asyncio.Task[Any]] = set()

    async def do(self, job: dict[str, Any], seconds: float, owner: int) -> dict[str, Any]:
        """The answer to a client's job. If the client disconnects, the job is finished anyway, since its process is busy with it.

        Raises Unavailable if no process is free in time, Ended if the job was abandoned, Unfit if no process can be started.
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
            task.exception()  # mark it as retrieved: the caller, if it still waits, has got it

    async def close(self) -> None:
        """End all processes."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for process in self._idle:
            await process.end()


class Prep:
    """Reads clients' texts and grammars for one server. tokenizer, eos: the engine's. most: most tokens of a prompt. shared:
    several clients share it (an owner is the number of an API key)."""

    def __init__(self, tokenizer: Any, eos: tuple[int, ...], most: int, shared: bool = False) -> None:
        self.most = most
        core = core_of(tokenizer)
        self._folder = folder_of(tokenizer)
        self.compiles = core is not None and find_spec("llguidance") is not None
        self._reads = self._folder is not None or (core is not None and not getattr(tokenizer, "chat_template", None))
        self.wild, writing = (False, False) if core is None else wild(core)
        if writing:  # the engine's thread decodes every token of every text with it
            raise ConfigError(
                "the decoder in the target's tokenizer.json may run for ever or write without bound: use another tokenizer"
            )
        texts = lambda: {"folder": self._folder} if self._folder else {"core": core_of(tokenizer)}  # noqa: E731
        grammars = lambda: {"grammar": core_of(tokenizer), "eos": list(eos)}  # noqa: E731
        self._texts, self.grammars = (Pool(2, hello, 1 if shared else 2) for hello in (texts, grammars))
        self._known: OrderedDict[bytes, tuple[str, float]] = OrderedDict()  # digest of a grammar: see `_tried`

    def in_thread(self, characters: int, template: bool) -> bool:
        """Whether a text of this size is read in a process. Never if the tokenizer cannot be sent to one (it has no file)."""
        return self._reads and (template or self.wild or characters > SHORT)

    async def encode(self, texts: list[str], special: bool, most: int, owner: int = 0) -> list[list[int]]:
        """Token ids of texts, read in a process. RequestError for a text of more than `most` tokens, or not read in time."""
        return await self._ids({"do": "encode", "texts": texts, "special": special, "most": most}, owner)

    async def chat(
        self, messages: list[dict[str, Any]], special: bool, owner: int = 0, **options: Any
    ) -> tuple[list[int], str]:
        """Token ids of a conversation by the model's chat template, and the end of its text, in a process."""
        job = {"do": "chat", "messages": messages, "special": special, "most": self.most, "options": options}
        answer = await self._answer(job, owner)
        return answer["ids"][0], answer["tail"]

    async def render(self, messages: list[dict[str, Any]], owner: int = 0, **options: Any) -> str:
        """The text of a conversation by the model's chat template, in a process."""
        return (await self._answer({"do": "render", "messages": messages, "options": options}, owner))["text"]

    async def dialect(self) -> Dialect:
        """What the model's chat template can do, found in a process."""
        try:
            answer = await self._texts.do({"do": "dialect"}, TEXT_SECONDS, 0)
        except (Ended, Unfit):
            return Dialect(None, why="its chat template could not be tried in time")
        found = answer.get("dialect")
        return Dialect.from_json(found) if found else Dialect(None, why="its chat template fails")

    async def _ids(self, job: dict[str, Any], owner: int) -> list[list[int]]:
        return (await self._answer(job, owner))["ids"]

    async def _answer(self, job: dict[str, Any], owner: int) -> dict[str, Any]:
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
        return answer

    async def try_grammar(self, text: str, owner: int = 0) -> None:
        """Compile a grammar in a process unless it is known. RequestError for a bad one, or if it takes too long."""
        if not self.compiles:
            return  # the engine reports it itself
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
        """Why a grammar is refused, or an empty string, and how long the answer is valid: a busy machine may succeed later."""
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
    """A text with more tokens than allowed."""

    def __init__(self, tokens: int, most: int) -> None:
        super().__init__(
            f"the prompt has {tokens} tokens and the context holds {most + 1}: shorten it to at most {most}"
        )
        self.tokens = tokens


def folder_of(tokenizer: Any) -> str | None:
    """The folder from which transformers has read this tokenizer, or its GGUF file; None if there is none."""
    place = getattr(tokenizer, "name_or_path", None)
    found = place and (os.path.isfile(place) or os.path.isfile(os.path.join(place, "tokenizer.json")))
    return str(place) if found else None
