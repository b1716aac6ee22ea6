"""The native decoder against a plain float64 decoder, against transformers, and against itself: the same bits in any company."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import stat
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from outrider.errors import CapacityError, RequestError
from outrider.target.decoder import DecoderConfig, DecoderWeights, LayerWeights
from outrider.target.kv import ContiguousKV
from outrider.target.native import NativeDecoder, build, load_native
from outrider.types import Draft, Rows

pytestmark = pytest.mark.skipif(
    not any(shutil.which(c) for c in ("c++", "g++", "clang++")), reason="the native decoder needs a C++ compiler"
)

BASE = DecoderConfig(
    family="llama",
    vocab_size=101,
    hidden=64,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    inner=96,
    eps=1e-6,
    max_length=256,
    window=(0, 0, 0),
    inv_freq=10000.0 ** -(torch.arange(0, 16, 2).float() / 16),
)


def shape(**changes: object) -> DecoderConfig:
    """BASE with changes; windows and frequencies follow the sizes."""
    config = dataclasses.replace(BASE, **changes)  # type: ignore[arg-type]
    window = tuple(config.window[i % len(config.window)] for i in range(config.layers))
    inv_freq = 10000.0 ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    return dataclasses.replace(config, window=window, inv_freq=inv_freq)


SHAPES = {
    "plain": (shape(), ()),
    "odd sizes": (shape(vocab_size=77, hidden=50, heads=5, kv_heads=1, head_dim=40, inner=71, layers=2), ()),
    "one head each": (shape(heads=3, kv_heads=3, head_dim=64, hidden=192, inner=512, vocab_size=130), ()),
    "tiny head": (shape(heads=2, kv_heads=1, head_dim=2, hidden=7, inner=5, vocab_size=3), ()),
    "windows": (shape(window=(6, 0, 3)), ()),
    "biases": (shape(), ("qkv_bias", "o_bias")),
    "norms": (shape(head_dim=24, rope_scale=1.2), ("q_norm", "k_norm")),
}


def random_weights(config: DecoderConfig, extras: Sequence[str], dtype: torch.dtype, seed: int = 0) -> DecoderWeights:
    """Weights that make logits of several nats and sharp attention."""
    rng = torch.Generator().manual_seed(seed)
    c, wide, kv = config, config.heads * config.head_dim, config.kv_heads * config.head_dim

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return (gain * columns**-0.5 * torch.randn(rows, columns, generator=rng)).to(dtype)

    def vector(n: int, middle: float) -> Tensor:
        return (middle + 0.3 * torch.randn(n, generator=rng)).to(dtype)

    def layer() -> LayerWeights:
        return LayerWeights(
            norm1=vector(c.hidden, 1.0),
            qkv=matrix(wide + 2 * kv, c.hidden, 1.5),
            qkv_bias=vector(wide + 2 * kv, 0.0) if "qkv_bias" in extras else None,
            q_norm=vector(c.head_dim, 1.5) if "q_norm" in extras else None,
            k_norm=vector(c.head_dim, 1.5) if "k_norm" in extras else None,
            o=matrix(c.hidden, wide),
            o_bias=vector(c.hidden, 0.0) if "o_bias" in extras else None,
            norm2=vector(c.hidden, 1.0),
            gate_up=matrix(2 * c.inner, c.hidden),
            down=matrix(c.hidden, c.inner, 2.0),
        )

    layers = tuple(layer() for _ in range(c.layers))
    return DecoderWeights(matrix(c.vocab_size, c.hidden, 4.0), layers, vector(c.hidden, 1.0), matrix(c.vocab_size, c.hidden, 3.0))


def new_kv(config: DecoderConfig, dtype: torch.dtype, slots: int = 1, capacity: int = 64) -> ContiguousKV:
    return ContiguousKV(config.layers, slots, config.kv_heads, capacity, config.head_dim, dtype, torch.device("cpu"))


def native(config: DecoderConfig, weights: DecoderWeights) -> NativeDecoder:
    decoder = load_native(config, weights)
    assert decoder is not None
    return decoder


def tokens(n: int, vocab: int, seed: int = 1) -> list[int]:
    return torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def forest(*trees: tuple[list[int], list[int]]) -> Draft:
    """One (tokens, parents within the tree) per sequence."""
    parent: list[int] = []
    for _, parents in trees:
        low = len(parent)
        parent += [p if p < 0 else low + p for p in parents]
    flat = [t for toks, _ in trees for t in toks]
    return Draft(torch.tensor(flat, dtype=torch.int64), tuple(parent), tuple(len(t) for t, _ in trees))


def reference(config: DecoderConfig, weights: DecoderWeights, path: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits [V] behind the last token of `path` and the hidden states [H] of that token after each block, all in float64."""
    c, n = config, len(path)
    d = lambda t: t.double()  # noqa: E731
    norm = lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + c.eps).sqrt() * d(w)  # noqa: E731
    angle = torch.arange(n).double()[:, None] * c.inv_freq.double()
    cos, sin = c.rope_scale * torch.cat([angle, angle], -1).cos(), c.rope_scale * torch.cat([angle, angle], -1).sin()
    half = c.head_dim // 2
    rope = lambda x: x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin  # noqa: E731
    x = d(weights.embedding)[path]
    hidden = [x[-1]]
    for w, window in zip(weights.layers, c.window, strict=True):
        qkv = norm(x, w.norm1) @ d(w.qkv).T + (0 if w.qkv_bias is None else d(w.qkv_bias))
        heads = qkv.view(n, c.heads + 2 * c.kv_heads, c.head_dim).transpose(0, 1)
        q, k, v = heads.split([c.heads, c.kv_heads, c.kv_heads])
        q, k = (q, k) if w.q_norm is None or w.k_norm is None else (norm(q, w.q_norm), norm(k, w.k_norm))
        k, v = (t.repeat_interleave(c.heads // c.kv_heads, 0) for t in (rope(k), v))
        score = rope(q) @ k.transpose(1, 2) * c.head_dim**-0.5
        age = torch.arange(n)[:, None] - torch.arange(n)
        seen = (age >= 0) & (age < window if window else torch.ones(n, n, dtype=torch.bool))
        mixed = score.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).reshape(n, -1) @ d(w.o).T + (0 if w.o_bias is None else d(w.o_bias))
        gate, up = (norm(x, w.norm2) @ d(w.gate_up).T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ d(w.down).T
        hidden.append(x[-1])
    return norm(x, weights.norm)[-1] @ d(weights.head).T, hidden


def paths_of(rows: Rows, history: dict[int, list[int]]) -> list[list[int]]:
    """For each row all tokens it sees, itself last."""
    out: list[list[int]] = []
    flat = rows.token.tolist()
    for s in rows.segments:
        local: list[list[int]] = []
        for i in range(s.count):
            above = (history[s.slot] if i == 0 else local[i - 1]) if i < s.prefix else local[s.parent[i - s.prefix]]
            local.append([*above, flat[s.first + i]])
        out += local
    return out


TREE = ([5, 6, 7, 8, 9, 1, 2], [-1, -1, 0, 0, 1, 3, 5])


def tolerance(dtype: torch.dtype) -> float:
    """Relative to the largest entry. bfloat16: 2^-9 each rounding of inputs, keys and values, grown by three sharp layers."""
    return 1e-5 if dtype is torch.float32 else 6e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    """Prompts in chunks, then a tree, a chain and an empty draft in one forward, slots of different lengths, taps everywhere."""
    config, extras = SHAPES[name]
    weights, v = random_weights(config, extras, dtype), config.vocab_size
    decoder, kv = native(config, weights), new_kv(config, dtype, slots=4)
    history = {slot: tokens(n, v, seed=slot) for slot, n in ((0, 11), (1, 1), (3, 20))}
    feed = Rows.assemble(list(history), list(history.values()), [0, 0, 0], Draft.empty(0), [False] * 3)
    assert decoder.forward(feed, kv, ()).logits.shape == (0, v)
    kv.commit(feed, [()] * 3)
    tree = ([t % v for t in TREE[0]], TREE[1])
    draft = forest(tree, ([1, 2, 0], [-1, 0, 1]), ([], []))
    rows = Rows.assemble([3, 0, 1], [[2], [1, 1], [0]], [20, 11, 1], draft)
    taps = tuple(range(config.layers + 1))
    scores = decoder.forward(rows, kv, taps)
    paths = paths_of(rows, history)
    for m, row in enumerate(rows.scored.tolist()):
        expected, _ = reference(config, weights, paths[row])
        assert (scores.logits[m] - expected).abs().max() <= tolerance(dtype) * expected.abs().max()
    for row, path in enumerate(paths):
        for tap, hidden in zip(taps, reference(config, weights, path)[1], strict=True):
            assert scores.hidden[tap].dtype == dtype
            assert (scores.hidden[tap][row] - hidden).abs().max() <= tolerance(dtype) * hidden.abs().max()
