"""Toy targets: a table with an exactly known distribution, and a tiny language model with real attention.

Both read the history *through the KV cache*, at the places that are visible to a row, so a wrong commit, a stale row or a
wrong slot shows in the logits. Both compute in float64, so that batch shapes differ only by rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from outrider.errors import ConfigError
from outrider.nn.attention import attend
from outrider.nn.kv import PagedKV
from outrider.nn.masks import ancestor_mask, hide
from outrider.nn.rope import rotation, turn
from outrider.nn.row_parts import check_prefix
from outrider.nn.stored import Stored, stored_as
from outrider.protocols import KVCache
from outrider.types import Rows, Scores, Segment


def _own(kv: KVCache, what: str) -> PagedKV:
    if not isinstance(kv, PagedKV):
        raise ConfigError(f"{what} reads a PagedKV, not a {type(kv).__name__}: make the cache with its new_kv()")
    return kv


def _places(s: Segment, order: int) -> list[list[int]]:
    """Cache places of each row's last `order` tokens, own token first; negative where the sequence had not begun."""
    level = list(range(s.cached, s.cached + s.count))
    up = list(range(s.cached - 1, s.cached + s.fed - 1)) + [s.cached + p for p in s.parent]
    out = [level]
    for _ in range(order - 1):
        level = [up[i - s.cached] if i >= s.cached else i - 1 for i in level]
        out.append(level)
    return out


class TableTarget:
    """A Markov chain of order 1, 2, ... given by its logits, optionally with another table at every position.

    logits: [V] * order + [V]: logits[a, b] (order 1) or logits[z, a, b] (order 2) of token b after ... z, a; or the
    same with a leading dimension T: logits[t] after the token at absolute position t, the last table serving all later
    positions. A sequence is preceded by token 0. Minus infinity is a zero probability. The hidden state after block 1
    is the logits themselves, the embedding is one-hot: hidden_size = vocab_size, one layer. Raises ConfigError for
    another shape.
    """

    layers = 1
    trees = True
    rewinds = True
    views = True
    uniform_rows = 1 << 30  # a row's logits are a line of the table
    notices: tuple[str, ...] = ()

    def __init__(self, logits: Float[Tensor, "..."], *, order: int = 1, max_length: int = 1 << 16) -> None:
        sizes = logits.shape[-order - 1 :]
        if order < 1 or logits.ndim not in (order + 1, order + 2) or len(set(sizes)) != 1:
            raise ConfigError(
                f"a table of order {order} has shape [V]*{order + 1} or [T]+[V]*{order + 1}, got {tuple(logits.shape)}"
            )
        self.table: Float[Tensor, "..."] = logits.double() if logits.ndim == order + 2 else logits.double()[None]
        self.order, self.max_length = order, max_length
        self.vocab_size = self.hidden_size = int(sizes[0])
        self.dtype, self.device = torch.float64, logits.device

    @staticmethod
    def random(vocab_size: int, *, seed: int, order: int = 1, positions: int = 1, sharp: float = 1.0) -> TableTarget:
        """Gaussian logits of standard deviation `sharp`, with another table for each of `positions`."""
        noise = torch.Generator().manual_seed(seed)
        shape = (positions,) + (vocab_size,) * (order + 1)
        return TableTarget(sharp * torch.randn(shape, generator=noise, dtype=torch.float64), order=order)

    def perturbed(self, scale: float, seed: int) -> TableTarget:
        """A related table: Gaussian noise of standard deviation `scale` added to every logit."""
        noise = torch.Generator().manual_seed(seed)
        shift = scale * torch.randn(self.table.shape, generator=noise, dtype=torch.float64).to(self.device)
        return TableTarget(self.table + shift, order=self.order, max_length=self.max_length)

    def distribution(self, history: Sequence[int]) -> Float[Tensor, "V"]:
        """The exact next-token distribution (temperature 1) after `history` (at least one token), read without any cache."""
        padded = [0] * self.order + list(history)
        t = min(len(history) - 1, self.table.shape[0] - 1)
        return torch.softmax(self.table[(t, *padded[-self.order :])], -1)

    def new_kv(self, slots: int, length: int) -> PagedKV:
        return PagedKV(1, slots, 1, length, 1, self.dtype, self.device)

    def forward(self, rows: Rows, kv: KVCache, *, layers: tuple[int, ...] = ()) -> Scores:
        paged = _own(kv, "TableTarget")
        paged.reserve(rows)
        cache = paged.k[0, 0, :, 0]  # [places]: the tokens themselves
        slot = [s.slot for s in rows.segments for _ in range(s.count)]
        places: list[list[int]] = [[] for _ in range(self.order)]
        for s in rows.segments:
            for level, more in zip(places, _places(s, self.order), strict=True):
                level += more
        where = torch.tensor([slot, *places])
        place = where[1:].flip(0)  # oldest first, as the table is indexed
        at = paged.at(where[0].expand_as(place), place.clamp(min=0)).to(self.device)
        cache[at[-1]] = rows.token.to(self.dtype)
        history = cache[at].long().masked_fill_(place.to(self.device) < 0, 0)
        position = rows.position.clamp(max=self.table.shape[0] - 1)
        need = slice(None) if 1 in layers else rows.scored
        logits = self.table[(position[need], *history[:, need])]
        taps = {0: lambda: self.embed(rows.token), 1: lambda: logits}
        return Scores(logits[rows.scored] if 1 in layers else logits, tuple(taps[i]() for i in layers))

    def embed(self, token: Int[Tensor, "n"]) -> Float[Tensor, "n H"]:
        return torch.nn.functional.one_hot(token, self.vocab_size).to(self.dtype)

    def unembed(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        return hidden

    def first_layers(self, layers: int) -> TableTarget:
        """Itself: a table is one block."""
        check_prefix(layers, self.layers)
        return self

    def norm(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
        return hidden

    def head(self, normed: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        return normed


@dataclass(frozen=True, slots=True)
class _Block:
    qkv: Float[Tensor, "H Q"]
    out: Float[Tensor, "H H"]
    up: Float[Tensor, "H I"]
    down: Float[Tensor, "I H"]


def _norm(x: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def _tell(
    attended: dict[int, Tensor],
    layer: int,
    slot: int,
    chunk: int,
    q: Float[Tensor, "h n D"],
    k: Float[Tensor, "h m D"],
    see: Bool[Tensor, "n m"],
) -> None:
    """Add one layer's weights to `PagedKV.attended`: the plain twin of the compiled decoder's sums."""
    score = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~see, -torch.inf)
    weight = pad(torch.softmax(score, -1).sum((0, 1)), (0, -k.shape[1] % chunk)).view(-1, chunk).sum(-1)
    attended[slot] = weight if layer == 0 else attended[slot] + weight


class TinyLM:
    """A random pre-norm transformer with rotary positions: the smallest model that uses a KV cache as a real model does.

    vocab_size: V. hidden: H, divisible by 2 * heads. layers: blocks. seed: of the weights. sharp: standard deviation of
    the logits (0 = uniform distribution, 3 = peaked). Attention runs segment by segment, so a row's numbers depend on other rows
    only by the rounding of the shared matrix products.
    """

    trees = True
    rewinds = True
    views = True
    notices: tuple[str, ...] = ()

    def __init__(
        self,
        vocab_size: int,
        hidden: int = 16,
        layers: int = 2,
        seed: int = 0,
        sharp: float = 2.0,
        *,
        heads: int = 2,
        max_length: int = 4096,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if hidden % (2 * heads):
            raise ConfigError(f"hidden ({hidden}) must be a multiple of twice the number of heads ({heads})")
        self.vocab_size, self.hidden_size, self.layers, self.heads = vocab_size, hidden, layers, heads
        self.max_length, self.dtype, self.device = max_length, dtype, torch.device("cpu")
        noise = torch.Generator().manual_seed(seed)

        def weight(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(rows, columns, generator=noise, dtype=torch.float64)
            return (scale * drawn / rows**0.5).to(dtype)

        self.embedding = weight(1, vocab_size * hidden).view(vocab_size, hidden)
        # queries and keys twice as large as usual: attention that is not an average over everything
        self.blocks = tuple(
            _Block(
                weight(hidden, 3 * hidden, 2.0),
                weight(hidden, hidden),
                weight(hidden, 2 * hidden),
                weight(2 * hidden, hidden),
            )
            for _ in range(layers)
        )
        self.output = weight(hidden, vocab_size, sharp)
        self.stored: Stored = stored_as("auto", dtype, hidden // heads)
        half = hidden // heads // 2
        self.inv_freq = (100.0 ** (-torch.arange(half, dtype=torch.float64) / half)).to(dtype)

    def perturbed(self, scale: float, seed: int) -> TinyLM:
        """A related model: every weight moved by `scale` of its matrix's standard deviation.

        As a draft its acceptance (1 - TV) is about 0.93, 0.83, 0.68, 0.55 for scale 0.02, 0.05, 0.1, 0.2.
        """
        noise = torch.Generator().manual_seed(seed)

        def move(w: Tensor) -> Tensor:
            return w + scale * w.std() * torch.randn(w.shape, generator=noise, dtype=torch.float64).to(w.dtype)

        other = TinyLM(
            self.vocab_size,
            self.hidden_size,
            self.layers,
            heads=self.heads,
            max_length=self.max_length,
            dtype=self.dtype,
        )
        other.embedding, other.output = move(self.embedding), move(self.output)
        other.blocks = tuple(_Block(move(b.qkv), move(b.out), move(b.up), move(b.down)) for b in self.blocks)
        return other

    def storing(self, kv_dtype: str) -> TinyLM:
        """The same weights with another cache, see `lean.LeanTarget.storing`."""
        other = copy.copy(self)
        other.stored = stored_as(kv_dtype, self.dtype, self.hidden_size // self.heads)
        return other

    def new_kv(self, slots: int, length: int) -> PagedKV:
        sizes = self.layers, slots, self.heads, length, self.hidden_size // self.heads
        return PagedKV(*sizes, self.dtype, self.device, stored=self.stored)

    def forward(self, rows: Rows, kv: KVCache, *, layers: tuple[int, ...] = ()) -> Scores:
        cache = _own(kv, "TinyLM")
        cache.reserve(rows)
        x = self.embed(rows.token)
        states = [x]
        cos, sin = rotation(rows.position, self.inv_freq)
        for i, block in enumerate(self.blocks):
            q, k, v = (_norm(x) @ block.qkv).view(rows.count, 3, self.heads, -1).unbind(1)
            x = x + self._attend(i, rows, cache, turn(q, cos, sin), turn(k, cos, sin), v) @ block.out
            x = x + torch.tanh(_norm(x) @ block.up) @ block.down
            states.append(x)
        return Scores(self.unembed(x[rows.scored]), tuple(states[i] for i in layers))

    def _attend(self, layer: int, rows: Rows, kv: PagedKV, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "N H"]:
        out = torch.empty_like(q)
        for s in rows.segments:
            mine = slice(s.first, s.first + s.count)
            keys, values = kv.write(layer, s.slot, s.cached, k[mine], v[mine])
            see = ancestor_mask(s.fed, s.parent, s.cached)
            hide(see, s.view, s.cached)
            seen = attend(q[mine].transpose(0, 1), keys, values, see)
            if kv.attended is not None and not s.view:
                _tell(kv.attended, layer, s.slot, kv.chunk, q[mine].transpose(0, 1), keys, see)
            out[mine] = seen.transpose(0, 1)
        return out.flatten(1)

    def embed(self, token: Int[Tensor, "n"]) -> Float[Tensor, "n H"]:
        return self.embedding[token]

    def unembed(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        return self.head(self.norm(hidden))

    def first_layers(self, layers: int) -> TinyLM:
        """See `protocols.OpenTarget`."""
        check_prefix(layers, self.layers)
        other = copy.copy(self)
        other.layers, other.blocks = layers, self.blocks[:layers]
        return other

    def norm(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
        return _norm(hidden)

    def head(self, normed: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        logits = normed @ self.output
        return logits if self.dtype == torch.float64 else logits.float()
