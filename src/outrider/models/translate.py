"""A model with another tokenizer, used through the tokens that both vocabularies spell the same.

As a draft it proposes only tokens that both have; its distributions are renormalised over that intersection, and declared so,
and the output keeps the target distribution. Only acceptance is lost: at most the target's probability of the intersection can
be accepted. History is fed token by token; a token that the draft does not have is fed as the longest prefix of its text that
the draft has, or as a space if there is none (token-level intersection: Timor et al. 2025, arXiv 2502.05202).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.errors import CapabilityError
from outrider.protocols import KVCache, Target, Tokenizer
from outrider.types import Rows, Scores


def byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers use for bytes (GPT-2): printable ones as themselves, others from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


def spelled(vocab: Mapping[str, int]) -> list[tuple[int, bytes]]:
    """(id, its bytes), by id.

    Byte-level vocabularies (a space is written U+0120) and SentencePiece's (U+2581, <0xNN>) are read; a token that is neither,
    such as <s>, stands for its own characters.
    """
    alphabet = byte_alphabet()
    bytewise = any("\u0120" in token for token in vocab)
    out: list[tuple[int, bytes]] = []
    for token, number in sorted(vocab.items(), key=lambda item: item[1]):
        if bytewise and token and all(c in alphabet for c in token):
            text = bytes(alphabet[c] for c in token)
        elif re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            text = bytes([int(token[3:5], 16)])
        else:
            text = token.replace("\u2581", " ").encode()
        out.append((number, text))
    return out


def spelling(vocab: Mapping[str, int]) -> dict[bytes, int]:
    """The bytes of each token -> its id; the lowest id if several are spelled the same."""
    return {text: number for number, text in reversed(spelled(vocab))}


class Translated:
    """`model` with the vocabulary of another tokenizer: implements `protocols.Target` over `vocab_size` tokens.

    shared: (target id, draft id) of the tokens that both vocabularies spell the same. fallback: per target id the draft id that is
    fed for it. Rows of logits are -inf outside the intersection. Raises CapabilityError if nothing is shared.
    """

    def __init__(
        self, model: Target, vocab_size: int, shared: Sequence[tuple[int, int]], fed: Sequence[int], name: str
    ) -> None:
        if not shared:
            raise CapabilityError(
                f"the vocabulary of {name!r} shares no token with the target's: use another draft, or 'ngram'"
            )
        self.model, self.vocab_size = model, vocab_size
        self._ours = torch.tensor([a for a, _ in shared], device=model.device)
        self._theirs = torch.tensor([b for _, b in shared], device=model.device)
        self.fed = torch.tensor(list(fed), device=model.device)
        self.hidden_size, self.layers, self.max_length = model.hidden_size, model.layers, model.max_length
        self.trees, self.rewinds, self.dtype, self.device = model.trees, model.rewinds, model.dtype, model.device
        self.uniform_rows, self.token_bytes = getattr(model, "uniform_rows", 0), getattr(model, "token_bytes", 0)
        self.notices: tuple[str, ...] = (
            f"{name}: {len(shared):,} of the target's {vocab_size:,} tokens are also the draft's; only those can be drafted",
        )

    def new_kv(self, slots: int, length: int, *, memory: int | None = None) -> KVCache:
        return self.model.new_kv(slots, length, **({} if memory is None else {"memory": memory}))

    def forward(self, rows: Rows, kv: KVCache, *, layers: tuple[int, ...] = ()) -> Scores:
        scores = self.model.forward(replace(rows, token=self.fed[rows.token]), kv, layers=layers)
        return Scores(self._spread(scores.logits), scores.hidden, scores.replayed)

    def embed(self, token: Int[Tensor, "n"]) -> Float[Tensor, "n H"]:
        return self.model.embed(self.fed[token])

    def unembed(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        return self._spread(self.model.unembed(hidden))

    def _spread(self, logits: Float[Tensor, "n W"]) -> Float[Tensor, "n V"]:
        out = logits.new_full((logits.shape[0], self.vocab_size), -torch.inf)
        out[:, self._ours] = logits[:, self._theirs]
        return out


def translate(
    model: Target, draft: Tokenizer, target: Tokenizer, vocab_size: int, name: str = "the draft"
) -> Translated:
    """`model` (whose tokenizer is `draft`) as a model over the tokens of `target`; `vocab_size`: of the target model."""
    theirs = {text: i for text, i in spelling(draft.get_vocab()).items() if i < model.vocab_size}
    ours = {text: i for text, i in spelling(target.get_vocab()).items() if i < vocab_size}
    shared = sorted((i, theirs[text]) for text, i in ours.items() if text in theirs)
    # never through `encode`: tokens that a tokenizer adds before a text (a begin of text, a space) are not part of it
    blank = next((theirs[text] for text in (b" ", b"\n") if text in theirs), shared[-1][1] if shared else 0)
    fed = [blank] * vocab_size
    for i, text in spelled(target.get_vocab()):
        if i >= vocab_size:
            break
        begins = (text[:n] for n in range(len(text), 0, -1))
        fed[i] = next((theirs[begin] for begin in begins if begin in theirs), blank)
    return Translated(model, vocab_size, shared, fed, name)


def shared_token_share(shared: Translated, tokens: Sequence[int]) -> float:
    """Share of the tokens of a text that the draft can propose: an estimate of the largest possible acceptance."""
    known = set(shared._ours.tolist())
    return sum(t in known for t in tokens) / max(len(tokens), 1)
