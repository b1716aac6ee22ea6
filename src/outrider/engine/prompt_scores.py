"""Log-probabilities of a prompt's own tokens, by one forward of the target over it, in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from outrider.engine.sequence import TokenLogprob
from outrider.protocols import Target
from outrider.sampling.pipeline import logprobs_of
from outrider.types import Draft, Rows

CHUNK = 256
"""Rows of a forward: other requests' steps go on between two."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """tokens: of the prompt. entries: for tokens[1:], each with the likeliest alternatives. ranks: of these tokens, from 1.
    following: the likeliest token behind the prompt."""

    tokens: tuple[int, ...]
    entries: tuple[TokenLogprob, ...]
    ranks: tuple[int, ...]
    following: TokenLogprob


def prompt_scores(target: Target, tokens: list[int], top: int) -> Iterator[PromptScores | None]:
    """Yields None after each chunk but the last, then the scores. Natural logarithms of the raw distribution, no processors.

    The rows are an anchor and a chain behind it, so every one of them gets logits.
    """
    kv = target.new_kv(1, len(tokens) + 1)
    entries, ranks = list[TokenLogprob](), list[int]()
    for start in range(0, len(tokens), CHUNK):
        piece = tokens[start : start + CHUNK]
        nodes = torch.tensor(piece[1:], dtype=torch.int64, device=target.device)
        draft = Draft(nodes, tuple(range(-1, len(piece) - 2)), (len(piece) - 1,))
        rows = Rows.assemble([0], [piece[:1]], [start], draft)
        with torch.inference_mode():
            kv.reserve(rows)
            logits = target.forward(rows, kv).logits
            kv.commit(rows, [list(range(len(piece) - 1))])
            following = tokens[start + 1 : start + 1 + len(piece)]
            found = logprobs_of(logits[: len(following)], following, top)
            scores = logits.float().log_softmax(-1) if logits.dtype != torch.float64 else logits.log_softmax(-1)
            for i, (token, value, best) in enumerate(zip(following, found.chosen, found.top, strict=True)):
                entries.append(TokenLogprob(token, value, tuple(best)))
                ranks.append(int((scores[i] > scores[i, token]).sum()) + 1)
            if start + CHUNK >= len(tokens):
                likeliest = int(logits[-1].argmax())
                last = logprobs_of(logits[-1:], [likeliest], top)
                after = TokenLogprob(likeliest, last.chosen[0], tuple(last.top[0]))
                yield PromptScores(tuple(tokens), tuple(entries), tuple(ranks), after)
                return
        yield None
