"""A drafter in a process of its own: Python and threads of its passes never wait for the target's, nor the target's for them.

`ahead:` in such a process prepares drafts beside a target whatever both are made of. A thread does as well where passes leave
Python for most of their time, as those of the compiled decoder do; models of transformers hardly do.

The process gets texts, never hidden states, and answers with drafts and their distributions. Noise is keyed by seed and place, so
they are those that the same drafter would make here: where the process ends, fails or no longer answers, a drafter here goes on,
with one notice and the same texts.
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import IO, Any, cast

import torch

from outrider.drafters.apart_child import LENGTH, Asked, Sent, on, packed
from outrider.drafters.combine import keep_within, need_of
from outrider.errors import CapabilityError
from outrider.protocols import Drafter
from outrider.records import CacheNeed
from outrider.types import Draft, Evidence, Proposal, SequenceView

logger = logging.getLogger(__name__)
START_SECONDS = 300.0
"""Seconds that a process may take to start and to load a model."""
PATIENCE = 60.0
"""Seconds that an answer may take later: a draft that waits for pages of a busy machine, not one that never comes."""


class Lost(Exception):
    """The process is gone, does not answer, or its drafter failed; the message says which."""


class Host:
    """A process that keeps drafters. It ends with this object, or with this process.

    patience: seconds after which an answer is given up. Thread-safe: one question at a time.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        reader, writer = os.pipe()  # not its stdout: what the machine's own start-up files print there is no answer
        self._answers = os.fdopen(reader, "rb", buffering=0)
        try:
            self._process = self._started(writer)
        finally:
            os.close(writer)
        os.set_blocking(cast(Any, self._process.stdin).fileno(), False)  # `_write` waits, with an end
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._forgotten: list[int] = []
        weakref.finalize(self, _end, self._process, self._answers)

    @staticmethod
    def _started(writer: int) -> subprocess.Popen[bytes]:
        """The process, which answers through the pipe `writer`."""
        return subprocess.Popen(
            [sys.executable, "-P", "-c", f"from outrider.drafters.apart_child import main; main({writer})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # until it sends to stderr what is printed
            bufsize=0,
            pass_fds=(writer,),
            process_group=0,  # Ctrl-C is ours
            env=os.environ
            | {
                "OMP_NUM_THREADS": str(torch.get_num_threads()),
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
            },
        )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def make(self, make: Callable[[], Drafter]) -> tuple[int, dict[str, Any]]:
        """Have a drafter made there; its number and attributes. make: can be pickled. Raises Lost."""
        number = next(self._numbers)
        return number, self.ask(number, "make", make, START_SECONDS)

    def forget(self, number: int) -> None:
        """A drafter is no longer needed: said with the next question, since this may be called at any time."""
        self._forgotten.append(number)

    def ask(self, number: int, what: str, given: object, seconds: float | None = None) -> Any:
        """The answer of a drafter there. Raises Lost; the process has ended then, unless the question or the answer could not be
        written down or the drafter failed."""
        seconds = self._patience if seconds is None else seconds
        with self._lock:
            forgotten, self._forgotten = self._forgotten, []
            try:
                data = packed((number, what, given, forgotten))
            except Exception as error:  # pickle raises many kinds
                raise Lost(f"{type(error).__name__}: {error}") from None
            end = time.monotonic() + seconds
            try:
                self._write(data, end)
                data = self._read(LENGTH.unpack(self._read(LENGTH.size, end))[0], end)
            except TimeoutError:
                self.end()
                raise Lost(f"no answer within {seconds:.0f} s") from None
            except (OSError, EOFError, ValueError):
                self.end()
                raise Lost(f"it ended with code {self._process.returncode}") from None
            except BaseException:  # an interrupt: the answer would be taken for that of the next question
                self.end()
                raise
        try:
            well, answer = pickle.loads(data)
        except Exception as error:  # of a class, say, that only the process knows
            raise Lost(f"its answer cannot be read: {type(error).__name__}: {error}") from None
        if not well:
            raise Lost(answer)
        return answer

    def end(self) -> None:
        """End the process."""
        _end(self._process, self._answers)

    def _write(self, data: bytes, end: float) -> None:
        pipe, rest = cast(Any, self._process.stdin), memoryview(data)
        with selectors.DefaultSelector() as ready:
            ready.register(pipe, selectors.EVENT_WRITE)
            while rest := rest[pipe.write(rest) or 0 :]:
                _wait(ready, end)

    def _read(self, count: int, end: float) -> bytes:
        pipe, parts = self._answers, bytearray()
        with selectors.DefaultSelector() as ready:
            ready.register(pipe, selectors.EVENT_READ)
            while len(parts) < count:
                _wait(ready, end)
                if not (part := os.read(pipe.fileno(), count - len(parts))):
                    raise EOFError("it has ended")
                parts += part
        return bytes(parts)


def _wait(ready: selectors.BaseSelector, end: float) -> None:
    if not ready.select(max(0.0, end - time.monotonic())):
        raise TimeoutError


def _end(process: subprocess.Popen[bytes], answers: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, answers):
        if pipe is not None:
            pipe.close()


class Apart:
    """The drafter that `make` makes in the process `host`.

    make: without arguments, can be pickled; its drafter reads texts alone (no hidden states, no cache of the target). instead: a
    drafter that proposes the same; it gets memory when the process is lost, not before. Requests with a grammar get no drafts,
    since the process has no tokenizer. Raises CapabilityError for a drafter that cannot be made or run there.
    """

    def __init__(self, make: Callable[[], Drafter], instead: Drafter, host: Host | None = None) -> None:
        there = self._host = Host() if host is None else host  # None: lost
        try:
            self._number, own = there.make(make)
        except Lost as lost:
            raise CapabilityError(
                f"this drafter could not be made in a process of its own ({lost}): drop 'apart:'"
            ) from None
        if own["layers"] or own["max_depth"] != instead.max_depth:
            raise CapabilityError(
                f"{own['name']!r} reads hidden states, or drafts {own['max_depth']} levels where its stand-in drafts "
                f"{instead.max_depth}: it cannot draft in a process of its own"
            )
        self._forget = weakref.finalize(self, there.forget, self._number)
        self.name = f"apart:{own['name']}"
        self.layers: tuple[int, ...] = ()
        self.max_nodes, self.max_depth = own["max_nodes"], own["max_depth"]
        self.trees, self.keyed = own["trees"], own["keyed"]
        self.instead = instead
        self.notices: list[str] = []
        self._bound: tuple[int, int] | None = None
        self._within: int | None = None
        self._released: list[int] = []
        self._known: dict[
            int, tuple[list[int], object]
        ] = {}  # by slot: the text and the parameters that the process has
        self._pipeline: object | None = None

    @property
    def pid(self) -> int | None:
        """The process's number; None when it is lost."""
        return None if self._host is None else self._host.pid

    def bind(self, slots: int, length: int) -> None:
        """Bind the drafter there."""
        self._bound = slots, length
        if self._host is None:
            self._bind_instead(slots, length)
        if self._host is not None and self._within is not None:
            self._ask("keep_within", self._within)
        if self._host is not None:
            self._ask("bind", (slots, length))

    def _bind_instead(self, slots: int, length: int) -> None:
        if self._within is not None:
            keep_within(self._within, self.instead)
        self.instead.bind(slots, length)

    def cache_need(self, slots: int, length: int) -> CacheNeed:
        """Of the drafter there: on one machine it counts as one here does."""
        found = self._ask("cache_need", (slots, length))
        return found if isinstance(found, CacheNeed) else need_of(slots, length, self.instead)

    def keep_within(self, tokens: int) -> None:
        """Limit its pages."""
        self._within = tokens

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots: said with the next step, so that nobody waits for it."""
        if self._host is None:
            self.instead.release(slots)
            return
        self._released += slots
        for slot in slots:
            self._known.pop(slot, None)

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """What the drafter there proposes; where it is lost, what the one here does."""
        found = None if self._host is None else self._ask("draft", self._asked(evidence, budget))
        if found is None:
            return self.instead.draft(evidence, budget)
        trees, q, notices = cast(tuple[list[tuple[list[int], list[int]]], Proposal | None, list[str]], found)
        self.notices = notices
        self._released = []
        device = evidence.scores.logits.device
        return Draft.join(trees, q and on(q, device), device)

    def _ask(self, what: str, given: object) -> object | None:
        """The answer; None where the process is lost: when that happens it is told, and the drafter here is bound in its place."""
        if self._host is None:
            return None
        try:
            return self._host.ask(self._number, what, given)
        except Lost as lost:
            said = (
                f"drafts are no longer made in a process of their own, since that failed ({lost}): they are made here"
            )
            logger.warning("%s", said)
            self.notices = [said]
            self._forget()
            self._host = None  # a process that keeps nothing else ends
            self._known, self._released = {}, []
            if self._bound is not None:
                self._bind_instead(*self._bound)
            return None

    def _asked(self, evidence: Evidence, budget: Sequence[int]) -> Asked:
        allowed = [0 if v.params.grammar is not None else b for v, b in zip(evidence.sequences, budget, strict=True)]
        fresh, self._pipeline = self._pipeline is not evidence.pipeline, evidence.pipeline
        return Asked(
            released=self._released,
            sequences=[self._sent(view) for view in evidence.sequences],
            verdict_index=evidence.verdict_index,
            draft=replace(evidence.draft, q=None, token=evidence.draft.token.cpu()),
            verdict=evidence.verdict,
            noise=evidence.noise,
            vocab_size=evidence.scores.logits.shape[-1],
            pipeline=evidence.pipeline if fresh else None,
            budget=allowed,
        )

    def _sent(self, view: SequenceView) -> Sent:
        """What of a sequence the process does not know yet."""
        text, params = self._known.get(view.slot, ([], None))
        start = len(text) if view.tokens[: len(text)] == text else 0
        text[start:] = new = view.tokens[start:]
        self._known[view.slot] = text, view.params
        given = None if view.params is params else view.params
        return Sent(view.slot, view.seed, view.prompt, view.cached, view.shares, start, new, given)
