"""A grammar that holds for parts of a text: behind the end of thinking, or from a mark (of a tool call) to its own end.

Elsewhere nothing is masked, so the distribution of free text is the model's own. Drafts may cross every border: the place of a node
is a function of the text and of its path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool
from torch import Tensor

from outrider.automata import Mark, Stages
from outrider.sampling.automaton import EXHAUSTED, Automaton, Compiled

Phase = Literal["first", "thinking", "gap", "free", "inside", "over"]
TAIL = 64
"""Bytes of free text that are remembered, to find a mark that is not one token."""
GAP = 2
"""Line breaks that may stand between the end of thinking and a text of a grammar."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a path is. tail: the last bytes of free text. breaks: line breaks since the thinking. fresh: no text yet but blanks."""

    phase: Phase
    tail: bytes = b""
    breaks: int = 0
    fresh: bool = True


@dataclass(slots=True)
class _Walk:
    """A walk along a path. own: the matcher is a copy of this walk. fed: tokens of the region that it has read in this walk.
    taken: how many of them the text's own matcher read. ended: an end token was passed. broken: the grammar forbids the path."""

    place: _Place
    matcher: Any
    own: bool = False
    fed: list[int] = field(default_factory=list)
    taken: int = 0
    ended: bool = False
    broken: bool = False


class StagedAutomaton(Automaton):
    """The position of one sequence in `Stages`."""

    def __init__(self, grammars: Compiled, text: str) -> None:
        self._stages, self._compiler = Stages.read(text), grammars.compiler
        super().__init__(grammars, text)

    def _start(self) -> None:
        super()._start()
        stages = self._stages
        self._region: list[int] = []
        first: Phase = "thinking" if stages.opened and stages.thinking else "first" if stages.thinking else self._enter
        self._place = _Place(first)

    @property
    def _enter(self) -> Phase:
        """The phase behind the thinking."""
        return "inside" if self._stages.trigger is None else "free"

    # ------------------------------------------------------------------ walking
    def _advance(self, new: Sequence[int]) -> None:
        if not new:
            return
        walk = self._go(new)
        if walk.own:
            self._matcher, self._alone, self._region = walk.matcher, False, []
        self._place, self._ended = walk.place, walk.ended
        self._region += walk.fed
        self._strayed = self._strayed or walk.broken
        self._seen += [int(t) for t in new]
        self._void.clear()

    def _go(self, path: Sequence[int]) -> _Walk:
        walk = _Walk(self._place, self._matcher, ended=self._ended)
        for token in map(int, path):
            if walk.broken:
                break
            self._token(walk, token)
        return walk

    def _token(self, walk: _Walk, token: int) -> None:
        """Take one token of a path."""
        place, thinking = walk.place, self._stages.thinking
        if walk.ended or place.phase == "over":
            walk.broken, walk.ended = token not in self._eos, True
        elif place.phase == "first" and thinking is not None and token == thinking[0].token:
            walk.place = _Place("thinking")
        elif place.phase == "first":
            walk.place = replace(place, phase=self._enter)
            self._token(walk, token)
        elif place.phase == "gap" and token in self._compiler.line_breaks and place.breaks < GAP:
            walk.place = replace(place, breaks=place.breaks + len(self._compiler.bytes_of(token)))
        elif place.phase in ("inside", "gap"):
            walk.place = replace(place, phase="inside")
            self._inside(walk, token)
        elif token in self._eos:
            walk.ended = True
            walk.broken = place.phase == "thinking" and self._stages.trigger is None
        else:
            self._free(walk, token)

    def _inside(self, walk: _Walk, token: int) -> None:
        if token in self._eos and walk.matcher.is_accepting():
            walk.ended = True
            return
        if not walk.matcher.try_consume_tokens([token]):
            walk.broken = True
            return
        walk.fed.append(token)
        walk.taken += not walk.own
        if self._stages.trigger is not None and walk.matcher.is_stopped():
            walk.place = _Place("over" if self._stages.final else "free", fresh=False)

    def _free(self, walk: _Walk, token: int) -> None:
        """A token of thinking or of free text; it may end with a mark, or with one and more."""
        place, stages = walk.place, self._stages
        mark = stages.trigger
        if place.phase == "thinking" and stages.thinking is not None:
            mark = stages.thinking[1]
        assert mark is not None
        rest = None
        if mark.token is not None:
            rest = b"" if token == mark.token else None
        else:
            text = place.tail + self._compiler.bytes_of(token)
            rest = _behind(text, mark, place.fresh)
            blank = place.fresh and not text.strip()
            walk.place = replace(place, tail=text[-TAIL:], fresh=blank)
        if rest is None:
            if mark.token is not None:
                walk.place = replace(place, fresh=False)
        elif place.phase == "thinking":
            self._leave(walk, rest)
        else:
            self._open(walk, rest)

    def _leave(self, walk: _Walk, rest: bytes) -> None:
        """The thinking has ended, with `rest` already behind it."""
        walk.place = _Place("gap" if self._stages.trigger is None else "free")
        for token in self._compiler.tokens_of(rest):
            self._token(walk, token)

    def _open(self, walk: _Walk, rest: bytes) -> None:
        """A region begins, with `rest` already in it; what the grammar cannot read makes it free text."""
        matcher = self._grammars.shared(self.text)
        tokens = self._compiler.tokens_of(rest) if rest else []
        if tokens and matcher.try_consume_tokens(tokens) < len(tokens):
            return
        walk.matcher, walk.own, walk.fed = matcher, True, list(tokens)
        walk.place = _Place("inside", fresh=False)

    # ------------------------------------------------------------------ masks
    def forced(self) -> list[int]:
        """Tokens of the text that the grammar forces next; none where the text is free."""
        return super().forced() if self._place.phase == "inside" else []

    def allowed(self, path: Sequence[int]) -> Bool[Tensor, "V"]:
        """Tokens that may follow the text and then `path`."""
        self._failed = False
        out = super().allowed(path)
        if self._failed and path:  # a copy on the path has used up its budget
            self.exhausted_on_draft = True
            self._void[tuple(path)] = EXHAUSTED
        return out

    _failed = False

    def _mask(self, path: Sequence[int]) -> npt.NDArray[np.bool_]:
        walk = self._go(path)
        mask = self._mask_at(walk)
        if walk.own and walk.matcher.is_error():
            self._failed, mask = True, self._ends()
        if walk.taken:
            self._matcher.rollback(walk.taken)
        return mask

    def _mask_at(self, walk: _Walk) -> npt.NDArray[np.bool_]:
        place, stages = walk.place, self._stages
        every = np.ones(self._size, dtype=bool)
        if walk.broken:
            return every
        if walk.ended or place.phase == "over":
            return self._ends()
        if place.phase == "thinking":
            every[list(self._eos)] = stages.trigger is not None
            return every
        if place.phase == "free" or (place.phase == "first" and stages.trigger is not None):
            return every
        mask = self._matched(walk.matcher)
        if place.phase == "first" and stages.thinking is not None and stages.thinking[0].token is not None:
            mask[stages.thinking[0].token] = True
        if place.phase == "gap" and place.breaks < GAP:
            mask[[t for t in self._compiler.line_breaks if t < self._size]] = True
        return mask

    def _restore(self) -> None:
        if self._dear:
            self._grammars.drop(self.text)
            return
        self._matcher, self._alone = self._grammars.own(self.text), True
        self._matcher.try_consume_tokens(self._region)


def _behind(text: bytes, mark: Mark, fresh: bool) -> bytes | None:
    """What follows a mark in the last bytes of a text; None if it is not there."""
    wanted = mark.text.encode()
    if mark.start:
        begun = text.lstrip()
        return begun if fresh and begun.startswith(wanted) else None
    at = text.find(wanted)
    return None if at < 0 else text[at + len(wanted) :]
