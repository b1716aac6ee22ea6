"""Attention over many parts of the cache: bits in any company, views of a part of it, and what it tells about where rows look."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from outrider.models.decoder import DecoderConfig
from outrider.models.lean import LeanTarget
from outrider.nn.kv import PagedKV
from outrider.types import Draft, Rows
from tests.models.test_native import DTYPES, SHAPES, forest, native, new_kv, pytestmark, random_weights, run  # noqa: F401

PART = 512
BEHIND = [PART - 3, PART, 2 * PART - 2]
"""Cached tokens: a tree crosses the end of a part, begins one, and crosses the end of a later one."""
TREE = ([5, 6, 7, 8, 9, 1], [-1, -1, 0, 0, 3, 4])
PATHS = {5: [0, 3, 4, 5], 1: [1], 2: [0, 2]}  # node -> nodes down to it


def filled(config: DecoderConfig, dtype: torch.dtype, cached: int, seed: int = 0) -> PagedKV:
    """A cache of random keys and values: their bits matter here, not where they came from."""
    kv = new_kv(config, dtype, capacity=cached + 16)
    kv.make_room(0, cached + 16)
    noise = torch.Generator().manual_seed(seed)
    for t in (kv.k, kv.v):
        t.copy_(torch.randn(t.shape, generator=noise))
    kv.length[0] = cached
    return kv


@DTYPES
@pytest.mark.parametrize("cached", BEHIND)
@pytest.mark.parametrize("name", ["plain", "odd sizes", "one head each", "windows", "norms"])
def test_a_node_has_the_bits_of_plain_decoding_across_parts(name: str, cached: int, dtype: torch.dtype) -> None:
    config, extras = SHAPES[name]
    if name == "windows":
        config = replace(config, window=(PART + 7, 0, 3))
    decoder = native(config, random_weights(config, extras, dtype))
    kv = filled(config, dtype, cached)
    together = run(decoder, Rows.assemble([0], [[3]], [cached], forest(TREE)), kv).logits
    for node, path in PATHS.items():
        kv = filled(config, dtype, cached)
        logits = torch.empty(0)
        for i, token in enumerate([3, *(TREE[0][k] for k in path)]):
            rows = Rows.assemble([0], [[token]], [cached + i], Draft.empty(1))
            logits = run(decoder, rows, kv).logits[0]
            kv.commit(rows, [()])
        assert torch.equal(together[1 + node], logits)


@DTYPES
def test_parts_taken_one_by_one_or_together_give_the_same_bits(dtype: torch.dtype) -> None:
    """Many rows fold their parts as they come, few rows afterwards, on one thread or two."""
    config, extras = SHAPES["plain"]
    decoder = native(config, random_weights(config, extras, dtype))
    text = torch.randint(config.vocab_size, (90,), generator=torch.Generator().manual_seed(3)).tolist()
    found: list[Tensor] = []
    for size, threads in ((90, 1), (30, 2), (9, 1)):
        kv = _roomier(config, dtype, filled(config, dtype, 2 * PART + 5))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            logits = torch.empty(0)
            for at in range(0, 90, size):
                rows = Rows.assemble([0], [text[at : at + size]], [2 * PART + 5 + at], Draft.empty(1))
                logits = run(decoder, rows, kv).logits
                kv.commit(rows, [()])
        finally:
            torch.set_num_threads(before)
        found.append(logits)
    assert all(torch.equal(found[0], other) for other in found[1:])


def _roomier(config: DecoderConfig, dtype: torch.dtype, kv: PagedKV) -> PagedKV:
    """The same entries in a cache with room for 200 more tokens."""
    out, n = new_kv(config, dtype, capacity=kv.length[0] + 200), kv.length[0]
    out.make_room(0, n + 200)
    out.k[:, :, :n], out.v[:, :, :n] = kv.entries(0, n)
    out.length[0] = n
    return out


VIEW = ((0, 5), (40, 41), (530, 600))


@DTYPES
def test_a_view_sees_its_tokens_and_no_others(dtype: torch.dtype) -> None:
    """The bits do not change when everything outside of the view does, and they do when the view does (negative control); torch's
    path, which masks, agrees."""
    config, extras = SHAPES["plain"]
    weights, n = random_weights(config, extras, dtype), 610
    target = LeanTarget(config, replace(weights, layers=tuple(weights.layers)))
    twin = LeanTarget(config, weights, native=False)
    rows = Rows.assemble([0], [[3]], [n], forest(([4, 5], [-1, 0])))
    seen = replace(rows, segments=tuple(replace(s, view=VIEW) for s in rows.segments))
    inside = torch.zeros(n, dtype=torch.bool)
    for start, end in VIEW:
        inside[start:end] = True

    def logits(target: LeanTarget, change: Tensor) -> Tensor:
        kv = filled(config, dtype, n)
        other = filled(config, dtype, n, seed=1)
        kv.k[:, :, :n][:, :, change], kv.v[:, :, :n][:, :, change] = (
            other.k[:, :, :n][:, :, change], other.v[:, :, :n][:, :, change],
        )  # fmt: skip
        return target.forward(seen, kv).logits

    plain = logits(target, torch.zeros(n, dtype=torch.bool))
    assert torch.equal(plain, logits(target, ~inside))
    assert not torch.equal(plain, logits(target, inside))
    masked = logits(twin, torch.zeros(n, dtype=torch.bool))
    assert (plain - masked).abs().max() <= (1e-4 if dtype is torch.float32 else 6e-2) * masked.abs().max()


@pytest.mark.parametrize("sunk", [False, True], ids=["plain", "sinks"])
def test_it_tells_the_weights_of_the_softmax(sunk: bool) -> None:
    """One layer, rows of a tree: sums of 16 tokens against a softmax in float64; together the rows times the heads, but for
    what sinks take (of one head nearly all, of another nearly nothing)."""
    config, extras = SHAPES["plain"]
    config, n = replace(config, layers=1, window=(0,)), PART + 40
    weights = random_weights(config, extras, torch.float32)
    sinks = torch.linspace(-4.0, 14.0, config.heads) if sunk else None
    weights = replace(weights, layers=(replace(weights.layers[0], sinks=sinks),))
    decoder, kv = native(config, weights), filled(config, torch.float32, PART + 40)
    kv.attended = {}
    run(decoder, Rows.assemble([0], [[3]], [n], forest(([4, 5], [-1, -1]))), kv)
    told = kv.attended[0]
    assert told.shape == (-(-(n + 3) // kv.chunk),)
    keys, x = kv.entries(0, n + 3)[0][0].double(), weights.embedding.double()[[3, 4, 5]]
    x = x / (x.pow(2).mean(-1, keepdim=True) + config.eps).sqrt() * weights.layers[0].norm1.double()
    q = (x @ weights.layers[0].qkv[: config.heads * config.head_dim].double().T).view(3, config.heads, -1)
    angle = torch.tensor([n, n + 1, n + 1]).double()[:, None, None] * config.inv_freq.double()
    a, b = q.chunk(2, -1)
    q = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    see = torch.ones(3, n + 3, dtype=torch.bool)
    see[:, n:] = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    group = config.heads // config.kv_heads
    score = torch.einsum("rhd,hmd->rhm", q, keys.repeat_interleave(group, 0)) * config.head_dim**-0.5
    own = torch.full((config.heads,), -torch.inf) if sinks is None else sinks
    score = torch.cat([score.masked_fill(~see[:, None], -torch.inf), own.double().expand(3, -1)[..., None]], -1)
    shares = score.softmax(-1)[..., :-1]
    taken = 3 * config.heads - float(shares.sum())
    assert abs(taken) < 1e-9 if sinks is None else 1 < taken < 3 * config.heads - 1
    assert float(told.sum()) == pytest.approx(3 * config.heads - taken, rel=1e-5)
    weight = shares.sum((0, 1))
    expected = torch.nn.functional.pad(weight, (0, -len(weight) % kv.chunk)).view(-1, kv.chunk).sum(-1)
    assert (told - expected).abs().max() < 1e-3
