"""Which tokens a target uses most: measured once on text that it writes, and kept on disk.

Half of the text ranks the tokens, by the mean of the target's own probabilities, which tells rare tokens apart where counts are
zero or one; the other half is for predictions about text that the ranking has not seen.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load, save
from torch import Tensor

from outrider.errors import ConfigError
from outrider.files import read_bytes, write_whole
from outrider.protocols import Target
from outrider.types import Draft, Rows

SEQUENCES, PROMPT, TOKENS = 32, 32, 64
"""Texts that the target writes, the tokens that they begin with, and those that it adds at temperature 1."""
VERSION = 1
BYTES, HEADER = 4, 4096
"""Of a number in the cache, and most of what a file has besides: longer ones are not read."""


@dataclass(frozen=True, slots=True)
class TokenUse:
    """order: [V] all tokens by falling mean probability. unseen: [S, L] texts that `order` does not know, of which the first
    `prompt` tokens were given."""

    order: Int[Tensor, "V"]
    unseen: Int[Tensor, "S L"]
    prompt: int


def use_of(target: Target, key: str, prompts: Sequence[Sequence[int]], report: Callable[[str], None]) -> TokenUse:
    """The use of tokens of the target that `key` identifies: from the cache, or from text that it writes now, behind `prompts`.

    prompts: see `prompts_from`. A cache that cannot be read or written costs time, never an error.
    """
    given = hashlib.sha256(f"{VERSION} {key} {target.vocab_size} {TOKENS} {[list(p) for p in prompts]}".encode())
    file = folder() / f"{given.hexdigest()[:32]}.safetensors"
    found = _read(file, target.vocab_size)
    if found is None:
        report(
            f"counting the tokens that the target uses, on {len(prompts) * TOKENS:,} of its own (once for this target)"
        )
        found = count(target, prompts)
        try:
            write_whole(file, save({"order": found.order.int(), "unseen": found.unseen.int()}))
        except (ConfigError, OSError):
            report(f"{file.parent} cannot be written: the tokens will be counted again")
    return found


def folder() -> Path:
    """`$XDG_CACHE_HOME/outrider/tokens`, or the same under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outrider" / "tokens"


def _read(file: Path, vocab_size: int) -> TokenUse | None:
    """What a file of the cache holds; None where there is none, or not a ranking of so many tokens."""
    try:
        held = load(read_bytes(file, BYTES * (vocab_size + SEQUENCES * (PROMPT + TOKENS)) + HEADER))
        order, unseen = held["order"].long(), held["unseen"].long()
    except Exception:  # whatever is wrong with a file that others may have touched, it is made anew
        return None
    whole = order.ndim == 1 and torch.equal(order.sort().values, torch.arange(vocab_size))
    fits = unseen.ndim == 2 and unseen.shape[1] == PROMPT + TOKENS and len(unseen) > 0
    return (
        TokenUse(order, unseen, PROMPT) if whole and fits and 0 <= unseen.min() <= unseen.max() < vocab_size else None
    )


def prompts_from(texts: Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    """SEQUENCES beginnings of PROMPT tokens: pieces of `texts` in turn; drawn tokens where these do not suffice."""
    pieces = [list(t[i : i + PROMPT]) for i in range(0, 4 * PROMPT, PROMPT) for t in texts if len(t) >= i + PROMPT]
    noise = torch.Generator().manual_seed(0)
    drawn = torch.randint(vocab_size, (SEQUENCES, PROMPT), generator=noise).tolist()
    return [*pieces, *drawn][:SEQUENCES]


@torch.inference_mode()
def count(target: Target, prompts: Sequence[Sequence[int]], tokens: int = TOKENS, seed: int = 0) -> TokenUse:
    """Let the target continue `prompts` (of one length) at temperature 1; every second text ranks the tokens."""
    every, device = len(prompts), target.device
    noise = torch.Generator(device).manual_seed(seed)
    slots, kv = list(range(every)), target.new_kv(every, len(prompts[0]) + tokens)
    texts, feed = [list(p) for p in prompts], [list(p) for p in prompts]
    mean = torch.zeros(target.vocab_size, dtype=torch.float64, device=device)
    for _ in range(tokens):
        cached = [len(t) - len(f) for t, f in zip(texts, feed, strict=True)]
        rows = Rows.assemble(slots, feed, cached, Draft.empty(every, device))
        p = torch.softmax(target.forward(rows, kv).logits.float(), -1)
        kv.commit(rows, [()] * every)
        mean += p[::2].sum(0)
        drawn = (p / torch.empty_like(p).exponential_(generator=noise)).argmax(-1).tolist()
        feed = [[t] for t in drawn]
        texts = [[*text, *more] for text, more in zip(texts, feed, strict=True)]
    order = mean.sort(descending=True, stable=True).indices.cpu()
    return TokenUse(order, torch.tensor(texts[1::2]), len(prompts[0]))


@torch.inference_mode()
def logits_on(model: Target, text: Int[Tensor, "L"], prompt: int) -> Float[Tensor, "n V"]:
    """The model's logits at the positions that predict the tokens of `text` behind its first `prompt`, all given.

    A token that the model does not have is read as token 0.
    """
    known = torch.where(text < model.vocab_size, text, 0).tolist()
    rows = Rows.assemble([0], [known], [0], Draft.empty(1, model.device))
    wanted = torch.arange(prompt - 1, len(known) - 1, device=model.device)
    rows = Rows(rows.token, rows.position, rows.segments, wanted)
    return model.forward(rows, model.new_kv(1, len(known))).logits.float()
