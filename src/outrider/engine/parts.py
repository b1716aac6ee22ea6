"""The components and observers of an engine. Both are given when it is constructed and never assigned again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from outrider.engine.turns import Turns
from outrider.protocols import Controller, Drafter, ImageReader, KVCache, Rule, Sink, Target
from outrider.sampling.pipeline import LogitsPipeline


@dataclass(frozen=True, slots=True)
class Parts:
    """The components that a step uses."""

    target: Target
    kv: KVCache
    pipeline: LogitsPipeline
    rule: Rule
    drafter: Drafter


@dataclass(frozen=True, slots=True)
class Defect:
    """A failure that was contained. It ends no request but the one it belongs to.

    kind: "draft" (invalid: a token outside the vocabulary, or an invalid distribution), "drafter", "controller" or "sink" (it
    raised), or "request" (a sequence that cannot continue: its grammar is exhausted).
    """

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Hooks:
    """The observers of an engine.

    controller: sets how deep each sequence drafts. sinks: receive the record of every step. on_defect: told of every defect when it
    happens, in the thread that steps; of a combined drafter as a whole, not of its parts. What it raises is logged.
    """

    controller: Controller
    sinks: tuple[Sink, ...] = ()
    on_defect: Callable[[Defect], None] | None = None


@dataclass(frozen=True, slots=True)
class CoreOptions:
    """How an engine runs.

    tokenizer: a Hugging Face tokenizer, or None to work on ids alone. slots: sequences decoded together. max_length: most tokens
    (prompt and output) of a sequence. chunk: rows of a prompt chunk. turns: shared by engines on one model, to take turns.
    prefix_cache: whether a sequence may use what others with the same beginning have computed. images: reads images, if the target
    can.
    """

    slots: int
    max_length: int
    chunk: int = 256
    tokenizer: Any = None
    turns: Turns | None = None
    prefix_cache: bool = True
    images: ImageReader | None = None
