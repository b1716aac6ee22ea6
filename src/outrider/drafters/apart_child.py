"""The process in which `apart.Host` keeps drafters. It ends when its parent's ends of the pipes are closed, however that happens,
whatever it is doing.

Messages are pickles, each after its length: both ends are this program. Questions come by stdin, answers go through a pipe of their
own, and what libraries print goes to stderr.
"""

from __future__ import annotations

import os
import pickle
import select
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import torch

from outrider.drafters.combine import keep_within, need_of
from outrider.noise import Noise
from outrider.params import SamplingParams
from outrider.protocols import Drafter
from outrider.types import Draft, Evidence, LogitsProcessing, Proposal, Rows, Scores, SequenceView, Verdict

LENGTH = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Sent:
    """A sequence. start: how many tokens of its text are known already; tokens: those behind them. params: None if known."""

    slot: int
    seed: int
    prompt: int
    cached: int
    shares: bool
    start: int
    tokens: list[int]
    params: SamplingParams | None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a drafter that reads nothing but texts gets of a step. released: slots to clear first. pipeline: None if known."""

    released: list[int]
    sequences: list[Sent]
    verdict_index: tuple[int, ...]
    draft: Draft
    verdict: Verdict
    noise: Noise
    vocab_size: int
    pipeline: LogitsProcessing | None
    budget: list[int]


class Resident:
    """A drafter, and the texts of its sequences so far."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self._texts: dict[int, tuple[list[int], SamplingParams]] = {}
        self._pipeline: LogitsProcessing | None = None

    def attributes(self) -> dict[str, Any]:
        """Those of the protocol, and whether its noise is keyed by places."""
        names = ("name", "layers", "max_nodes", "max_depth", "trees")
        return {name: getattr(self.drafter, name) for name in names} | {"keyed": getattr(self.drafter, "keyed", False)}

    def draft(self, asked: Asked) -> tuple[list[tuple[list[int], list[int]]], Proposal | None, list[str]]:
        """Its trees, their distributions, and what there is to be told."""
        self._release(asked.released)
        self._pipeline = asked.pipeline or self._pipeline
        assert self._pipeline is not None
        nothing = torch.empty(0, dtype=torch.int64)
        evidence = Evidence(
            rows=Rows(nothing, nothing, (), nothing),
            scores=Scores(torch.empty(0, asked.vocab_size)),
            draft=asked.draft,
            verdict=asked.verdict,
            sequences=tuple(self._view(sent) for sent in asked.sequences),
            segment_index=(-1,) * len(asked.sequences),
            verdict_index=asked.verdict_index,
            noise=asked.noise,
            pipeline=self._pipeline,
        )
        made = self.drafter.draft(evidence, asked.budget)
        trees = [(list(tokens), list(parents)) for tokens, parents in map(made.tree, range(len(made.counts)))]
        return trees, made.q and on(made.q, "cpu"), list(getattr(self.drafter, "notices", ()))

    def _view(self, sent: Sent) -> SequenceView:
        tokens, params = self._texts.get(sent.slot, ([], None))
        params = sent.params or params
        assert params is not None
        tokens[sent.start :] = sent.tokens
        self._texts[sent.slot] = tokens, params
        return SequenceView(sent.slot, sent.seed, tokens, sent.prompt, sent.cached, params, sent.shares)

    def _release(self, slots: list[int]) -> None:
        self.drafter.release(slots)
        if (forget := getattr(self._pipeline, "release", None)) is not None:
            forget(slots)
        for slot in slots:
            self._texts.pop(slot, None)


def on(q: Proposal, device: torch.device | str) -> Proposal:
    """The distributions on a device."""
    probs = q.probs.to(device)
    support = None if q.support is None else q.support.to(device)
    return replace(q, probs=probs, support=support, sound=probs if q.sound is q.probs else None)


def packed(message: object) -> bytes:
    """A message as it is written."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data


def write(pipe: BinaryIO, data: bytes) -> None:
    """Write all of it to an unbuffered pipe. Raises OSError if the other end is gone."""
    rest = memoryview(data)
    while rest:
        rest = rest[pipe.write(rest) or 0 :]


def main(pipe: int) -> None:
    """Do what is asked for ever: the number of a drafter, what to do, with what, and the numbers of drafters to forget.

    pipe: the open file that answers are written to.
    """
    os.set_inheritable(pipe, False)
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(pipe, "wb", buffering=0)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a library that asks something must not read a question
    threading.Thread(target=_end_with, args=(answers.fileno(),), name="outrider-parent", daemon=True).start()
    residents: dict[int, Resident] = {}
    while len(head := questions.read(LENGTH.size)) == LENGTH.size:
        try:
            data = packed((True, _do(residents, *pickle.loads(questions.read(LENGTH.unpack(head)[0])))))
        except (
            Exception
        ) as error:  # the drafter's, or an answer that cannot be written down: the parent does without it
            data = packed((False, f"{type(error).__name__}: {error}"[:300]))
        write(answers, data)
    os._exit(0)  # a thread may still be preparing drafts that nobody will ask for


def _end_with(answers: int) -> None:
    """End when nobody can read answers any more, also in the middle of one that takes long or never comes."""
    reader = select.poll()
    reader.register(answers, 0)  # a pipe that has lost its reader is told of in any case
    reader.poll()
    os._exit(0)


def _do(residents: dict[int, Resident], number: int, what: str, given: Any, forgotten: list[int]) -> object:
    for gone in forgotten:
        residents.pop(gone, None)
    if what == "make":
        make: Callable[[], Drafter] = given
        residents[number] = Resident(make())
        return residents[number].attributes()
    one = residents[number]
    match what:
        case "draft":
            return one.draft(given)
        case "cache_need":
            return need_of(*given, one.drafter)
        case "keep_within":
            return keep_within(given, one.drafter)
        case _:
            return one.drafter.bind(*given)
