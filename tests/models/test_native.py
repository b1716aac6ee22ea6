"""The native decoder against a plain float64 decoder, against transformers, and against itself: the same bits in any company."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import shutil
import stat
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from outrider import isa
from outrider.errors import CapacityError, RequestError
from outrider.models.decoder import DecoderConfig, DecoderWeights, Experts, LayerWeights
from outrider.models.native import NativeDecoder, load_native
from outrider.models.native.build import load_library
from outrider.models.native.weights import NativeWeights
from outrider.nn import compiled
from outrider.nn.compiled import DECODER, Unit
from outrider.nn.kv import PagedKV
from outrider.types import Draft, Rows, Scores
from tests.models.plain_decoder import reference

pytestmark = pytest.mark.skipif(
    not any(shutil.which(c) for c in ("c++", "g++", "clang++")), reason="the native decoder needs a C++ compiler"
)

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


SENSITIVE = ("plain", "odd sizes", "one head each", "windows", "biases", "norms", *list(SHAPES)[-6:-2], list(SHAPES)[-1])


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


@DTYPES
def test_takes_few_rows_unless_torch_has_no_kernels(dtype: torch.dtype) -> None:
    decoder = native(*tiny(dtype))
    few = 256 if decoder.kind.startswith("AVX-512") else 32
    assert decoder.max_rows == (sys.maxsize if decoder.kind in ("AVX2", "generic") and dtype is torch.bfloat16 else few)


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


def from_transformers(model: Any, family: str, window: tuple[int, ...]) -> tuple[DecoderConfig, DecoderWeights]:
    """The weights of a transformers decoder, linears fused."""
    c, state = model.config, {k.removeprefix("model."): v.detach() for k, v in model.state_dict().items()}
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    config = DecoderConfig(
        family, c.vocab_size, c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, width,
        c.intermediate_size, c.rms_norm_eps, 256, window, model.model.rotary_emb.inv_freq.float(),
    )  # fmt: skip

    def fused(at: str, names: str, kind: str) -> Tensor | None:
        parts = [state.get(f"{at}.{name}.{kind}") for name in names.split()]
        return None if parts[0] is None else torch.cat([p for p in parts if p is not None]).contiguous()

    def layer(i: int) -> LayerWeights:
        attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
        return LayerWeights(
            norm1=state[f"layers.{i}.input_layernorm.weight"],
            qkv=fused(attention, "q_proj k_proj v_proj", "weight"),  # type: ignore[arg-type]
            qkv_bias=fused(attention, "q_proj k_proj v_proj", "bias"),
            q_norm=state.get(f"{attention}.q_norm.weight"),
            k_norm=state.get(f"{attention}.k_norm.weight"),
            o=state[f"{attention}.o_proj.weight"],
            o_bias=state.get(f"{attention}.o_proj.bias"),
            norm2=state[f"layers.{i}.post_attention_layernorm.weight"],
            gate_up=fused(mlp, "gate_proj up_proj", "weight"),  # type: ignore[arg-type]
            down=state[f"{mlp}.down_proj.weight"],
        )

    layers = tuple(layer(i) for i in range(config.layers))
    norm = state["norm.weight"]
    return config, DecoderWeights(state["embed_tokens.weight"], layers, norm, state["lm_head.weight"], norm.dtype)


FAMILIES = {
    "llama": ("Llama", {"attention_bias": True}, (0, 0)),
    "qwen2": ("Qwen2", {}, (0, 0)),
    "qwen3": ("Qwen3", {"head_dim": 24}, (0, 0)),
    "mistral": ("Mistral", {"sliding_window": 5}, (5, 5)),
}


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family: str, dtype: torch.dtype) -> None:
    """A prompt of 12 and a chain of 4 against one transformers forward; logits with a spread of several nats.

    float32: 1e-4 absolute. bfloat16: transformers rounds every intermediate to 8 bits, we only the inputs of products, so the
    difference is mostly theirs; against transformers in float32 we must be the nearer of the two (mean absolute error).
    """
    transformers = pytest.importorskip("transformers")
    name, extra, window = FAMILIES[family]
    config_class, model_class = (getattr(transformers, f"{name}{kind}") for kind in ("Config", "ForCausalLM"))
    torch.manual_seed(0)
    model = model_class(
        config_class(
            vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, attn_implementation="eager", **extra,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 1.5 * parameter.shape[-1] ** -0.5)
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    path = tokens(16, 97)
    with torch.inference_mode():
        exact = model(torch.tensor([path])).logits[0, 11:]
        theirs = model.to(dtype)(torch.tensor([path])).logits[0, 11:].float()
    config, weights = from_transformers(model, family, window)
    decoder, kv = native(config, weights), new_kv(config, dtype)
    rows = Rows.assemble([0], [path[:12]], [0], forest((path[12:], [-1, 0, 1, 2])))
    ours = run(decoder, rows, kv, ()).logits
    assert exact.std() > 1.0
    if dtype is torch.float32:
        assert (ours - exact).abs().max() <= 1e-4
    else:
        assert (ours - exact).abs().mean() <= (theirs - exact).abs().mean()


def tiny(dtype: torch.dtype = torch.float32) -> tuple[DecoderConfig, DecoderWeights]:
    config, extras = SHAPES["plain"]
    return config, random_weights(config, extras, dtype)


def test_refuses_what_would_read_or_write_elsewhere() -> None:
    config, weights = tiny()
    decoder, kv = native(config, weights), new_kv(config, torch.float32, capacity=4)
    plain = Rows.assemble([0], [[1, 2]], [0], Draft.empty(1))
    with pytest.raises(RequestError, match="vocabulary of 101"):
        decoder.forward(Rows.assemble([0], [[101]], [0], Draft.empty(1)), kv, ())
    with pytest.raises(CapacityError, match="max_length"):
        decoder.forward(Rows.assemble([0], [[1, 2, 3]], [2], Draft.empty(1)), kv, ())
    for page in (-1, 1):  # of another cache, or none at all
        kv.pages.table[0] = page
        with pytest.raises(ValueError, match="segments"):
            decoder.forward(plain, kv, ())
    kv.make_room(0, 4)
    kv.pages.table[0] = 0
    with pytest.raises(ValueError, match="segments"):
        decoder.forward(Rows.assemble([1], [[1]], [0], Draft.empty(1)), kv, ())
    wrong = dataclasses.replace(plain.segments[0], parent=(5,))
    with pytest.raises(ValueError, match="segments"):
        decoder.forward(dataclasses.replace(plain, segments=(wrong,)), kv, ())
    with pytest.raises(ValueError, match="scored row"):
        decoder.forward(dataclasses.replace(plain, scored=torch.tensor([2])), kv, ())
    with pytest.raises(ValueError, match="layers in 0..3"):
        decoder.forward(plain, kv, (4,))
    with pytest.raises(ValueError, match="cache"):
        decoder.forward(plain, new_kv(config, torch.float64), ())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float16}, "float16; choose dtype"),
        ({"embedding": torch.zeros(101, 64, dtype=torch.float16)}, "embedding is not a contiguous"),
        ({"head": torch.zeros(64, 101).T}, "head is not a contiguous"),
        ({}, r"embedding has shape \(101, 64\), not \(102, 64\)"),
    ],
)
def test_says_why_not(change: dict[str, Any], reason: str) -> None:
    config, weights = tiny()
    if not change:
        config = dataclasses.replace(config, vocab_size=102)
    decoder, notices = load_native(config, dataclasses.replace(weights, **change))
    assert decoder is None
    assert re.search(reason, *notices)


def test_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")
    decoder, notices = load_native(*tiny())
    assert decoder is None
    assert [("OUTRIDER_NATIVE" in n, "unset it" in n) for n in notices] == [(True, True)]


def test_two_builds_at_once(tmp_path: Path) -> None:
    """Processes that build side by side get one library, leave nothing behind, and the next one finds it."""
    compiler = tmp_path / "compiler"  # writes an empty file after -o, slowly
    compiler.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && sleep 0.1 && : > "$2"; shift; done\n')
    compiler.chmod(0o700)
    folder = tmp_path / "cache"
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(compiled.build, DECODER, [str(compiler)], folder, openmp=True) for _ in range(2)]
        library = {job.result() for job in jobs}.pop()
    assert [p.name for p in folder.iterdir()] == [library.name]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    built = library.stat().st_mtime_ns
    assert compiled.build(DECODER, [str(compiler)], folder, openmp=True) == library
    assert library.stat().st_mtime_ns == built


def test_runs_on_any_cpu_of_this_kind(tmp_path: Path) -> None:
    """Compiled without this CPU's own instructions and without threads: the same reference, the same invariance."""
    level = isa.LEVELS[isa.machine()][0]
    flags = [
        *compiled.FLAGS,
        "-O0",
        *level.flags,
    ]  # compiled in a quarter of the time; test_wheel.py has all as they are shipped
    compiled.compile_unit(DECODER, compiled.find_compiler(), flags, library := tmp_path / "decoder.so")
    for dtype in (torch.float32, torch.bfloat16):
        config, extras = SHAPES["odd sizes"]
        weights, path = random_weights(config, extras, dtype), tokens(9, config.vocab_size)
        loaded = ctypes.CDLL(str(library))
        decoder = NativeDecoder(loaded, config, NativeWeights.of(loaded, weights))
        rows = Rows.assemble([0], [path[:5]], [0], forest((path[5:], [-1, 0, 1, 2])))
        logits = run(decoder, rows, new_kv(config, dtype), ()).logits
        expected, _ = reference(config, weights, path)
        assert (logits[-1] - expected).abs().max() <= tolerance(dtype) * expected.abs().max()
        assert torch.equal(logits[-1], alone(decoder, config, dtype, path)[0])


@pytest.mark.parametrize("what", ["folder", "library"])
def test_refuses_code_that_others_can_write(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    (folder if what == "folder" else _stand_in(folder)).chmod(0o777)
    with pytest.raises(compiled.BuildError, match="written by other users"):
        compiled.build(DECODER, compiled.find_compiler(), folder, openmp=True)


def test_refuses_code_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(compiled.BuildError, match="another user"):
        compiled.build(DECODER, compiled.find_compiler(), tmp_path, openmp=True)


def _stand_in(folder: Path) -> Path:
    """An empty file where the library would be."""

    def compile_nothing(unit: Unit, compiler: list[str], flags: list[str], library: Path) -> None:
        library.touch(mode=0o700)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "compile_unit", compile_nothing)
        return compiled.build(DECODER, compiled.find_compiler(), folder, openmp=True)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see loaded libraries")
def test_shares_torch_s_threads() -> None:
    """No second OpenMP runtime comes with the library: two pools would fight for the cores."""
    assert load_library() is not None
    loaded = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines()}
    assert len([path for path in loaded if re.match(r"lib[gi]?omp\d?\b", path.name)]) <= 1
