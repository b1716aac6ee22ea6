"""The native decoder against a plain float64 decoder and against itself: the same bits in any company."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from outrider.models.decoder import DecoderConfig, DecoderWeights, Experts, LayerWeights
from outrider.models.native import NativeDecoder, load_native
from outrider.nn.kv import PagedKV
from outrider.types import Draft, Rows, Scores
from tests.compilers import needs_compiler
from tests.models.plain_decoder import reference

pytestmark = needs_compiler

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

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


FREQUENCIES = [base ** -(torch.arange(0, 16, 2).float() / 16) for base in (1e6, 1e3)]
"""Of the first 16 numbers of a head."""
SHAPES = {
    "plain": (shape(), ()),
    "odd sizes": (shape(vocab_size=77, hidden=50, heads=5, kv_heads=1, head_dim=40, inner=71, layers=2), ()),
    "one head each": (shape(heads=3, kv_heads=3, head_dim=64, hidden=192, inner=512, vocab_size=130), ()),
    "tiny head": (shape(heads=2, kv_heads=1, head_dim=2, hidden=7, inner=5, vocab_size=3), ()),
    "windows": (shape(window=(6, 0, 3)), ()),
    "biases": (shape(), ("qkv_bias", "o_bias")),
    "norms": (shape(head_dim=24, rope_scale=1.2), ("q_norm", "k_norm")),
    "four norms, bounds, two frequencies": (
        dataclasses.replace(
            shape(window=(5, 0, 5), head_dim=24, activation="gelu_pytorch_tanh", attention_scale=0.31, attention_cap=3.0,
                  embed_scale=2.1, embed_scale_rounded=True, logit_cap=4.0, turns=(1, 0, 1), wide_norms=True),
            inv_freq=FREQUENCIES[0], local_freq=FREQUENCIES[1],
        ),
        ("q_norm", "k_norm", "post1", "post2"),
    ),
    "norms behind, of rows, factors": (
        shape(turns=(0, -1, 0), residual_scale=0.7, embed_scale=1.7, logit_scale=0.4, wide_norms=True),
        ("q_norm of rows", "k_norm of rows", "post1", "post2", "no norm1", "no norm2"),
    ),
    "experts": (shape(experts=Experts(8, 3, 56, True, (True, False, True))), ()),
    "experts, norms of rows": (
        shape(hidden=50, clip=1.0, experts=Experts(5, 2, 37, False, (True,) * 3)), ("q_norm of rows", "k_norm of rows"),
    ),
    "all experts": (shape(experts=Experts(4, 4, 40, True, (True,) * 3)), ()),
    "experts, bounds, biases, sinks": (
        shape(window=(5, 0, 5), wide_norms=True, experts=Experts(6, 2, 40, True, (True,) * 3, limit=1.0, gain=1.7)),
        ("qkv_bias", "o_bias", "sinks", "biases of experts"),
    ),
}  # fmt: skip
CHOOSING = ("experts", "experts, norms of rows", "experts, bounds, biases, sinks")
"""Rounding to bfloat16 may choose another expert, and then nothing is near: these are compared with numbers in float32 alone."""


def random_weights(config: DecoderConfig, extras: Sequence[str], dtype: torch.dtype, seed: int = 0) -> DecoderWeights:
    """Weights that make logits of several nats and sharp attention."""
    rng = torch.Generator().manual_seed(seed)
    c, wide, kv = config, config.heads * config.head_dim, config.kv_heads * config.head_dim

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return (gain * columns**-0.5 * torch.randn(rows, columns, generator=rng)).to(dtype)

    def vector(n: int, middle: float) -> Tensor:
        return (middle + 0.3 * torch.randn(n, generator=rng)).to(dtype)

    def norm(n: int, middle: float = 1.0) -> Tensor:
        weight = vector(n, middle)
        return weight.float() if c.wide_norms else weight

    def biases(e: Experts) -> dict[str, Tensor]:
        sizes = {"router_bias": e.count, "gate_up_bias": 2 * e.count * e.inner, "down_bias": e.count * c.hidden}
        return {name: vector(n, 0.0) for name, n in sizes.items()}

    def layer(i: int) -> LayerWeights:
        e = c.experts if c.experts is not None and c.experts.sparse[i] else None
        rows = "q_norm of rows" in extras
        return LayerWeights(
            norm1=None if "no norm1" in extras else norm(c.hidden),
            qkv=matrix(wide + 2 * kv, c.hidden, 1.5),
            qkv_bias=vector(wide + 2 * kv, 0.0) if "qkv_bias" in extras else None,
            q_norm=norm(wide if rows else c.head_dim, 1.5) if rows or "q_norm" in extras else None,
            k_norm=norm(kv if rows else c.head_dim, 1.5) if rows or "k_norm" in extras else None,
            o=matrix(c.hidden, wide),
            o_bias=vector(c.hidden, 0.0) if "o_bias" in extras else None,
            norm2=None if "no norm2" in extras else norm(c.hidden),
            gate_up=matrix(2 * (c.inner if e is None else e.count * e.inner), c.hidden),
            down=matrix(c.hidden * (1 if e is None else e.count), c.inner if e is None else e.inner, 2.0),
            post1=norm(c.hidden) if "post1" in extras else None,
            post2=norm(c.hidden) if "post2" in extras else None,
            router=None if e is None else matrix(e.count, c.hidden, 2.0),
            **({} if e is None or "biases of experts" not in extras else biases(e)),
            sinks=vector(c.heads, 0.0) if "sinks" in extras else None,
        )

    layers = tuple(layer(i) for i in range(c.layers))
    return DecoderWeights(
        matrix(c.vocab_size, c.hidden, 4.0),
        layers,
        norm(c.hidden),
        matrix(c.vocab_size, c.hidden, 3.0),
        dtype,
        c.wide_norms,
    )


CPU = torch.device("cpu")


def new_kv(config: DecoderConfig, dtype: torch.dtype, slots: int = 1, capacity: int = 64, page: int = 64) -> PagedKV:
    return PagedKV(config.layers, slots, config.kv_heads, capacity, config.head_dim, dtype, CPU, page=page)


def run(decoder: NativeDecoder, rows: Rows, kv: PagedKV, layers: tuple[int, ...] = ()) -> Scores:
    """A forward, for whose rows there is room."""
    kv.reserve(rows)
    return decoder.forward(rows, kv, layers)


def native(config: DecoderConfig, weights: DecoderWeights) -> NativeDecoder:
    decoder, _ = load_native(config, weights)
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


def paths_of(rows: Rows, history: dict[int, list[int]]) -> list[list[int]]:
    """For each row all tokens it sees, itself last."""
    out: list[list[int]] = []
    flat = rows.token.tolist()
    for s in rows.segments:
        local: list[list[int]] = []
        for i in range(s.count):
            above = (history[s.slot] if i == 0 else local[i - 1]) if i < s.fed else local[s.parent[i - s.fed]]
            local.append([*above, flat[s.first + i]])
        out += local
    return out


TREE = ([5, 6, 7, 8, 9, 1, 2], [-1, -1, 0, 0, 1, 3, 5])


def tolerance(dtype: torch.dtype) -> float:
    """Relative to the largest entry. bfloat16: 2^-9 each rounding of inputs, keys and values, grown by three sharp layers."""
    return 1e-5 if dtype is torch.float32 else 6e-2


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, d) for n in SHAPES for d in (torch.float32, torch.bfloat16) if d is torch.float32 or n not in CHOOSING],
)
def test_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    """Prompts in chunks, then a tree, a chain and an empty draft in one forward, slots of different lengths, taps everywhere."""
    config, extras = SHAPES[name]
    weights, v = random_weights(config, extras, dtype), config.vocab_size
    decoder, kv = native(config, weights), new_kv(config, dtype, slots=4)
    history = {slot: tokens(n, v, seed=slot) for slot, n in ((0, 11), (1, 1), (3, 20))}
    feed = Rows.assemble(list(history), list(history.values()), [0, 0, 0], Draft.empty(0), [False] * 3)
    assert run(decoder, feed, kv, ()).logits.shape == (0, v)
    kv.commit(feed, [()] * 3)
    tree = ([t % v for t in TREE[0]], TREE[1])
    draft = forest(tree, ([1, 2, 0], [-1, 0, 1]), ([], []))
    rows = Rows.assemble([3, 0, 1], [[2], [1, 1], [0]], [20, 11, 1], draft)
    taps = tuple(range(config.layers + 1))
    scores = run(decoder, rows, kv, taps)
    paths = paths_of(rows, history)
    for m, row in enumerate(rows.scored.tolist()):
        expected, _ = reference(config, weights, paths[row])
        assert (scores.logits[m] - expected).abs().max() <= tolerance(dtype) * expected.abs().max()
    for row, path in enumerate(paths):
        for tap, hidden in zip(taps, reference(config, weights, path)[1], strict=True):
            assert scores.hidden[tap].dtype == dtype
            assert (scores.hidden[tap][row] - hidden).abs().max() <= tolerance(dtype) * hidden.abs().max()


SENSITIVE = (
    "plain",
    "odd sizes",
    "one head each",
    "windows",
    "biases",
    "norms",
    *list(SHAPES)[-6:-2],
    list(SHAPES)[-1],
)


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def alone(
    decoder: NativeDecoder, config: DecoderConfig, dtype: torch.dtype, path: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits behind `path`, and its keys and values, when every token is decoded by itself in an empty cache."""
    kv = new_kv(config, dtype)
    logits = torch.empty(0)
    for i, token in enumerate(path):
        rows = Rows.assemble([0], [[token]], [i], Draft.empty(1))
        logits = run(decoder, rows, kv, ()).logits[0]
        kv.commit(rows, [()])
    n = len(path)
    return logits, *kv.entries(0, n)


@DTYPES
@pytest.mark.parametrize("name", SENSITIVE)
def test_chains_have_the_bits_of_plain_decoding(name: str, dtype: torch.dtype) -> None:
    """1 to 9 rows behind 7 cached tokens: logits of every row, keys and values."""
    config, extras = SHAPES[name]
    decoder = native(config, random_weights(config, extras, dtype))
    path = tokens(16, config.vocab_size)
    single = [alone(decoder, config, dtype, path[: n + 1]) for n in range(7, 16)]
    for n in range(1, 10):
        kv = new_kv(config, dtype)
        prompt = Rows.assemble([0], [path[:7]], [0], Draft.empty(0), [False])
        run(decoder, prompt, kv, ())
        kv.commit(prompt, [()])
        chain = forest((path[8 : 7 + n], list(range(-1, n - 2))))
        logits = run(decoder, Rows.assemble([0], [[path[7]]], [7], chain), kv, ()).logits
        for i in range(n):
            assert torch.equal(logits[i], single[i][0]), f"row {i} of {n}"
        assert all(map(torch.equal, kv.entries(0, 7 + n), single[n - 1][1:]))


@DTYPES
@pytest.mark.parametrize("name", SENSITIVE)
def test_scattered_pages_give_the_bits_of_one_piece(name: str, dtype: torch.dtype) -> None:
    """Two sequences on pages of 3 places here and there, a tree behind each, and what follows its accepted path."""
    config, extras = SHAPES[name]
    decoder = native(config, random_weights(config, extras, dtype))
    texts, found = [tokens(10, config.vocab_size, seed=i) for i in range(2)], []
    for page in (3, 64):
        kv, scores = new_kv(config, dtype, slots=2, page=page), []
        for slot, index in ((0, 0), (1, 2), (0, 3), (1, 0)) if page == 3 else ():
            kv.make_room(slot, 15)
            kv.pages.give_back(kv.pages.replace(slot, index)[0])
        for at in range(0, 10, 2):
            rows = Rows.assemble([0, 1], [t[at : at + 2] for t in texts], [at, at], Draft.empty(0), [False, False])
            run(decoder, rows, kv)
            kv.commit(rows, [(), ()])
        draft = forest(([5, 1, 2, 3], [-1, -1, 0, 1]), ([4, 2], [-1, 0]))
        rows = Rows.assemble([0, 1], [[7], [8]], [10, 10], draft)
        scores.append(run(decoder, rows, kv).logits)
        kv.commit(rows, [[1, 3], [0, 1]])
        rows = Rows.assemble([0, 1], [[3], [3]], [13, 13], Draft.empty(2))
        scores.append(run(decoder, rows, kv).logits)
        found.append([*scores, *kv.entries(0, 14), *kv.entries(1, 14)])
    assert all(map(torch.equal, *found))


@DTYPES
@pytest.mark.parametrize("name", SENSITIVE)
def test_tree_nodes_have_the_bits_of_plain_decoding(name: str, dtype: torch.dtype, threads: None) -> None:
    """Two trees and a prompt chunk in one forward, on 1, 2 and 3 threads, against each path decoded by itself."""
    config, extras = SHAPES[name]
    decoder = native(config, random_weights(config, extras, dtype))
    history = {slot: tokens(n, config.vocab_size, seed=slot) for slot, n in ((0, 5), (2, 17))}
    rows = Rows.assemble(
        [2, 1, 0],
        [[3], tokens(13, config.vocab_size), [4, 2]],
        [17, 0, 5],
        forest(TREE, ([9, 1], [-1, -1])),
        [True, False, True],
    )
    expected = {
        path: alone(decoder, config, dtype, list(path))[0] for path in map(tuple, paths_of(rows, history | {1: []}))
    }
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        kv = new_kv(config, dtype, slots=3)
        feed = Rows.assemble(list(history), list(history.values()), [0, 0], Draft.empty(0), [False] * 2)
        run(decoder, feed, kv, ())
        kv.commit(feed, [()] * 2)
        logits = run(decoder, rows, kv, ()).logits
        paths = paths_of(rows, history | {1: []})
        for m, row in enumerate(rows.scored.tolist()):
            assert torch.equal(logits[m], expected[tuple(paths[row])]), f"row {row} on {count} threads"


@DTYPES
def test_an_accepted_path_goes_on_with_the_same_bits(dtype: torch.dtype) -> None:
    """A path through a tree is committed; the next forward sees the cache that plain decoding has."""
    config, extras = SHAPES["windows"]
    decoder = native(config, random_weights(config, extras, dtype))
    kv = new_kv(config, dtype)
    rows = Rows.assemble([0], [[1, 2, 3]], [0], forest(TREE))
    run(decoder, rows, kv, ())
    kv.commit(rows, [(0, 3, 5)])
    path = [1, 2, 3, TREE[0][0], TREE[0][3], TREE[0][5], 7]
    logits = run(decoder, Rows.assemble([0], [[7]], [6], Draft.empty(1)), kv, ()).logits[0]
    assert torch.equal(logits, alone(decoder, config, dtype, path)[0])


def test_many_rows(threads: None) -> None:
    """More rows than any tile, more threads than heads: still the reference's numbers."""
    config, extras = SHAPES["biases"]
    weights = random_weights(config, extras, torch.float32)
    torch.set_num_threads(7)
    path = tokens(50, config.vocab_size)
    rows = Rows.assemble([0], [path], [0], Draft.empty(1))
    expected, _ = reference(config, weights, path)
    logits = run(native(config, weights), rows, new_kv(config, torch.float32), ()).logits[0]
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
