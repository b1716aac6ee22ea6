"""The results of a finished request."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.engine.sequence import Sequence, TokenLogprob
from outrider.records import Counts


@dataclass(frozen=True, slots=True)
class Output:
    """One finished sample of a request."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    counts: Counts
    origins: tuple[str, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """One finished request: its prompt and its `n` outputs."""

    request: str
    prompt: tuple[int, ...]
    outputs: tuple[Output, ...]

    @property
    def text(self) -> str:
        return self.outputs[0].text


def result_of(request: str, sequences: list[Sequence]) -> Result:
    """The result of a request's samples; an aborted one has the tokens it had so far."""
    return Result(request, tuple(sequences[0].tokens[: sequences[0].prompt]), tuple(map(_output, sequences)))


def _output(s: Sequence) -> Output:
    return Output(
        s.index,
        tuple(s.output),
        "".join(s.pieces),
        s.finish_reason or "abort",
        s.counts,
        tuple(s.origins),
        tuple(s.logprobs),
        s.error,
    )
