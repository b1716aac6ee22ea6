"""Vocabularies of drafters: subsets of the target's, logits over the whole, and the check that another model's agrees."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.errors import CapabilityError, ConfigError
from outrider.protocols import Tokenizer
from outrider.vocabulary import first_difference


def spread(logits: Float[Tensor, "*n S"], support: Int[Tensor, "S"] | None, vocab_size: int) -> Float[Tensor, "*n V"]:
    """Logits over the target's vocabulary: minus infinity for tokens that are not in `support`. None: all tokens."""
    if support is None:
        return logits
    out = logits.new_full((*logits.shape[:-1], vocab_size), -torch.inf)
    out[..., support] = logits
    return out


def from_offsets(offsets: Tensor | None, size: int, vocab_size: int, folder: Path) -> Int[Tensor, "S"] | None:
    """Target tokens of a drafter's `size` tokens from `d2t`: column i stands for token i + d2t[i]. None: the same tokens.

    Raises ConfigError for an invalid map.
    """
    if size == vocab_size and (offsets is None or not bool(offsets.any())):
        return None
    if offsets is None or offsets.shape != (size,):
        raise ConfigError(
            f"{folder}: a draft vocabulary of {size} tokens needs d2t, its map into the target's {vocab_size} tokens"
        )
    return checked(torch.arange(size) + offsets.cpu().long(), vocab_size, folder)


def checked(support: Int[Tensor, "S"], vocab_size: int, folder: Path) -> Int[Tensor, "S"]:
    """`support`, if it names distinct tokens of a vocabulary of `vocab_size`; raises ConfigError otherwise."""
    low, high = int(support.min()), int(support.max())
    if low < 0 or high >= vocab_size or len(support.unique()) != len(support):
        raise ConfigError(
            f"{folder}: its map of tokens names {low} to {high}, {len(support.unique())} different ones of {len(support)}; "
            f"the target has {vocab_size}: download or train it again"
        )
    return support


def to_offsets(support: Int[Tensor, "S"], vocab_size: int) -> dict[str, Tensor]:
    """`d2t` (offsets) and `t2d` (which of the target's tokens are drafted) of a folder in the `speculators` layout."""
    drafted = torch.zeros(vocab_size, dtype=torch.bool)
    drafted[support.cpu()] = True
    return {"d2t": support.cpu() - torch.arange(len(support)), "t2d": drafted}


def check_vocabulary(target: object, draft: object, limit: int, name: str) -> None:
    """Raise CapabilityError if an id below `limit` stands for different strings in the tokenizers of target and draft."""
    differs = first_difference(cast(Tokenizer, target).get_vocab(), cast(Tokenizer, draft).get_vocab(), limit)
    if differs is not None:
        token, ours, theirs = differs
        raise CapabilityError(
            f"token {token} is {ours!r} for the target and {theirs!r} for the draft model {name!r}: "
            f"write 'translate:{name}' to draft with the tokens that both spell the same, or use 'ngram'"
        )
