"""The results of a finished request, and how a notebook shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from outrider import canvas, markup
from outrider.engine.sequence import Sequence, TokenLogprob
from outrider.errors import printable
from outrider.records import Counts

SHOWN = 60
"""Characters of a text in a `repr`."""
MOST_OUTPUTS = 8
"""Outputs of a result that a notebook shows."""


@dataclass(frozen=True, slots=True, repr=False)
class Output:
    """One finished sample of a request.

    origins: where each token came from (`engine.sequence.ORIGINS`). pieces: for each token the text that was final with it; joined
    they are `text`. A token may have none: one that ends the text, or a part of a character.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    counts: Counts
    origins: tuple[str, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None
    pieces: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Output({_brief(self.text)}, {_told(self)})"

    def _repr_html_(self) -> str:
        wrong = "" if self.error is None else markup.note(markup.escaped(self.error))
        text = markup.coloured(self.pieces, self.origins, self.token_ids)
        return text + markup.legend(self.origins) + markup.note(markup.escaped(_told(self))) + wrong

    def plot(self) -> Any:
        """A matplotlib figure: tokens over passes of the target, beside plain decoding's one token a pass.

        Raises ConfigError where matplotlib is missing.
        """
        figure, (ax,) = canvas.new_picture()
        ends = [i + 1 for i, origin in enumerate(self.origins) if origin != "accepted"]
        tokens = [0, *ends, *([len(self.origins)] if self.origins and self.origins[-1] == "accepted" else [])]
        passes = range(len(tokens))
        ax.step(passes, tokens, where="post", color=canvas.COLOURS[0], label="speculative")
        ax.plot(passes, passes, "--", color=canvas.COLOURS[3], label="plain: one token a pass")
        ax.set(xlabel="passes of the target", ylabel="tokens", title=_told(self))
        ax.title.set_fontsize(9)
        ax.legend(frameon=False)
        return figure


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """One finished request: its prompt and its `n` outputs."""

    request: str
    prompt: tuple[int, ...]
    outputs: tuple[Output, ...]

    @property
    def text(self) -> str:
        return self.outputs[0].text

    def __repr__(self) -> str:
        many = f" and {len(self.outputs) - 1} outputs more" if len(self.outputs) > 1 else ""
        first = f"{_brief(self.text)}, {_told(self.outputs[0])}" if self.outputs else "no output"
        return f"Result({first}{many}; {len(self.prompt)} prompt tokens)"

    def _repr_html_(self) -> str:
        shown = [output._repr_html_() for output in self.outputs[:MOST_OUTPUTS]]
        more = len(self.outputs) - len(shown)
        return "<hr>".join(shown) + (markup.note(f"and {more} outputs more") if more > 0 else "")

    def plot(self) -> Any:
        """`Output.plot` of the first output."""
        return self.outputs[0].plot()


def _brief(text: str) -> str:
    """The start of a text, as a Python string that is safe to print."""
    return printable(repr(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"))


def _told(output: Output) -> str:
    """What there is to know of an output besides its text."""
    counts, tokens = output.counts, len(output.token_ids)
    length = f", {counts.tokens / counts.steps:.2f} tokens per step" if counts.steps else ""
    return f"{tokens} token{'s' * (tokens != 1)}{length}, {output.finish_reason}"


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
        tuple(s.pieces),
    )
