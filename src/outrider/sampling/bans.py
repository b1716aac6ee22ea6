"""Tokens that a request rules out: all but its `allowed_token_ids`, and the last token of each of its `bad_words`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.params import SamplingParams


def rule_out(
    row: Float[Tensor, "V"], params: SamplingParams, tokens: Sequence[int], prompt: int, path: Sequence[int]
) -> None:
    """Forbid tokens of one row, in place. tokens: of prompt and output, the first `prompt` of them the prompt. path: the drafted
    tokens behind them. A ban that would leave no possible token is not applied."""
    before = row.clone()
    if params.allowed_token_ids:
        row.fill_(-torch.inf)
        ids = list(params.allowed_token_ids)
        row[ids] = before[ids]
    banned = [word[-1] for word in params.bad_words if _ends_with(word[:-1], tokens, prompt, path)]
    if banned:
        row[banned] = -torch.inf
    if not torch.isfinite(row.amax()):
        row.copy_(before)


def _ends_with(head: Sequence[int], tokens: Sequence[int], prompt: int, path: Sequence[int]) -> bool:
    """Whether output and path end with `head`."""
    n = len(head)
    if n <= len(path):
        return list(path[len(path) - n :]) == list(head)
    own = n - len(path)
    return len(tokens) - prompt >= own and [*tokens[len(tokens) - own :], *path] == list(head)
