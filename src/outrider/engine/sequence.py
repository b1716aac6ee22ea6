"""One request's sequence: its tokens, its progress, and when it ends. One object per sequence; no parallel lists."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from outrider.engine.text import TextStream
from outrider.params import SamplingParams
from outrider.pictured import Pictured
from outrider.records import Counts
from outrider.types import SequenceView

ORIGINS = ("accepted", "corrected", "bonus", "sampled")
"""Where a token came from: an accepted draft token; the correction of a rejected one; the bonus token after a fully accepted
draft; or the target alone, when nothing was proposed."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (nats) of an emitted token under the raw target distribution, and the most likely alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """What one step added to one sequence. `text` is the text that is final now; `finish_reason` is set on the last event.

    origins: each token's origin (see ORIGINS). error: why it failed; blame: the cause, "request" (it cannot be served as it is) or
    "engine".
    """

    request: str
    index: int
    tokens: tuple[int, ...]
    origins: tuple[str, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    blame: str | None = None


@dataclass(eq=False)
class Sequence:
    """A sequence from its submission to its end.

    tokens: prompt and output; the last one is the anchor while decoding. prompt: length of the prompt.
    slot:   -1 while waiting. cached: tokens in the target's KV cache. limit: most tokens it may hold (context).
    entered: tokens that it had when it got its slot. reused: tokens of its prompt that others had computed.
    shares: see `SequenceView`. root: with whom it shares beginnings: its salt, and the target's weights when it began.
    pictured: the images of its prompt. pieces: for each emitted token the text that was final with it.
    """

    request: str
    index: int
    tokens: list[int]
    prompt: int
    params: SamplingParams
    seed: int
    limit: int
    eos: frozenset[int]
    text: TextStream | None = None
    slot: int = -1
    cached: int = 0
    entered: int = 0
    reused: int = 0
    shares: bool = True
    root: Hashable = None
    pictured: Pictured | None = None
    finish_reason: str | None = None
    error: str | None = None
    counts: Counts = field(default_factory=Counts)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        return self.request, self.index

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt :]

    @property
    def keyed(self) -> list[int]:
        """The tokens by which the cache knows its beginning: images count by what is in them."""
        return self.tokens if self.pictured is None else self.pictured.keyed(self.tokens)

    @property
    def room(self) -> int:
        """Tokens it may still emit."""
        return min(self.params.max_tokens - (len(self.tokens) - self.prompt), self.limit - len(self.tokens))

    def view(self) -> SequenceView:
        return SequenceView(self.slot, self.seed, self.tokens, self.prompt, self.cached, self.params, self.shares)

    def emit(self, tokens: list[int], origins: list[str], logprobs: list[TokenLogprob]) -> Event:
        """Append tokens one by one and stop at the first that ends the sequence: the only place where output is cut."""
        kept, pieces = 0, list[str]()
        for token in tokens:
            self.tokens.append(token)
            kept += 1
            pieces.append(self._advance(token))
            if self.finish_reason is not None:
                break
        self.origins += origins[:kept]
        self.logprobs += logprobs[:kept]
        self.counts.emitted += kept
        self.pieces += pieces
        return Event(
            self.request,
            self.index,
            tuple(tokens[:kept]),
            tuple(origins[:kept]),
            "".join(pieces),
            tuple(logprobs[:kept]),
            self.finish_reason,
        )

    def _advance(self, token: int) -> str:
        """Text that may be shown after `token`; sets `finish_reason` if the sequence ends with it."""
        produced = len(self.tokens) - self.prompt
        early = produced <= self.params.min_tokens
        ended = token in self.params.stop_token_ids or (token in self.eos and not self.params.ignore_eos)
        if ended and not early:
            self.finish_reason = "stop"
            return self.text.finish() if self.text else ""
        text = self.text.push(token) if self.text else ""
        if self.text and self.text.stopped:
            self.finish_reason = "stop"
        elif self.room <= 0:
            text += self.text.finish() if self.text else ""
            self.finish_reason = (
                "stop" if self.text and self.text.stopped else "length"
            )  # the last text may complete a stop
        return text

    def fail(self, message: str, blame: str = "engine") -> Event:
        """End this sequence with an error; other sequences are not affected."""
        self.finish_reason, self.error = "error", message
        return Event(self.request, self.index, (), (), "", (), "error", message, blame)
