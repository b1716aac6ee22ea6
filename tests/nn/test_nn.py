"""Rows and tensors: each piece of `outrider.nn` against its plain twin, and what the package may know."""

from __future__ import annotations

import ast
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import outrider.nn
from outrider.errors import CapacityError
from outrider.nn import rope
from outrider.nn.attention import attend
from outrider.nn.kv import check_kept, check_room
from outrider.nn.layers import FusedLayer, Mlp, rms_norm
from outrider.nn.masks import ancestor_mask
from outrider.nn.row_cache import RowCache
from outrider.nn.row_parts import last_scored, run_parts
from outrider.types import Draft, Rows, Scores, Segment, Tree

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


# --------------------------------------------------------------------------------------------------------------- masks
def ancestors(prefix: int, parents: tuple[int, ...], cached: int) -> Tensor:
    """The plain twin: every cached place, a row's own place, and all that its parent sees."""
    n = prefix + len(parents)
    see = torch.ones(n, n, dtype=torch.bool).tril()
    for row, parent in enumerate(parents, prefix):
        see[row] = see[parent] if parent >= 0 else False
        see[row, row] = True
    return torch.cat([torch.ones(n, cached, dtype=torch.bool), see], 1)


@given(data=st.data(), prefix=st.integers(1, 5), nodes=st.integers(0, 9), cached=st.integers(0, 7))
def test_what_a_row_sees_is_its_ancestors_in_their_window(data, prefix, nodes, cached):
    """Any tree, any window, against the definition: walk up from each row, counting positions."""
    parents = [data.draw(st.integers(prefix - 1, prefix + i - 1)) for i in range(nodes)]
    segment = Segment(0, 0, cached, prefix, tuple(parents), True)
    width, end = data.draw(st.integers(0, 9)), cached + segment.count
    start = data.draw(st.integers(0, max(0, cached - width + 1) if width else 0))
    expected = torch.zeros(segment.count, end, dtype=torch.bool)
    for row in range(segment.count):
        place, seen = cached + row, 0
        while place >= 0 and (width == 0 or seen < width):
            expected[row, place] = True
            offset, seen = place - cached, seen + 1
            place = cached + parents[offset - prefix] if offset >= prefix else place - 1
    found = ancestor_mask(prefix, parents, cached, window=width, start=start)
    assert torch.equal(found, expected[:, start:])
    wide = ancestor_mask(prefix, parents, cached, window=width, start=start, end=end + 3)
    assert torch.equal(wide[:, : end - start], found) and not wide[:, end - start :].any()


@given(data=st.data(), prefix=st.integers(0, 4), nodes=st.integers(0, 9), cached=st.integers(0, 7))
def test_a_mask_is_its_plain_twin_and_its_last_rows(data, prefix, nodes, cached):
    """Nodes that hang on what is cached as well: a drafter's rows have no prefix."""
    parents = tuple(data.draw(st.integers(-1, prefix + i - 1)) for i in range(nodes))
    plain = ancestors(prefix, parents, cached)
    assert torch.equal(ancestor_mask(prefix, parents, cached), plain)
    last = data.draw(st.integers(0, prefix + nodes))
    assert torch.equal(ancestor_mask(prefix, parents, cached, last=last), plain[prefix + nodes - last :])


# ----------------------------------------------------------------------------------------------------------- attention
def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float | None, sinks: Tensor | None
):
    """Head by head and row by row, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[-1])
    for h in range(q.shape[0]):
        g = h // (q.shape[0] // k.shape[0])
        for i in range(q.shape[1]):
            seen = mask[i].nonzero().flatten()
            score = k[g, seen] @ q[h, i] * scale
            score = score if cap is None else cap * torch.tanh(score / cap)
            score = score if sinks is None else torch.cat([score, sinks[h : h + 1].double()])
            out[h, i] = torch.softmax(score, 0)[: len(seen)] @ v[g, seen]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("how", ["plain", "fold", "softcap", "sinks", "causal", "all"])
def test_attention_of_one_sequence_is_the_formula(how: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    noise = torch.Generator().manual_seed(heads[0])
    drawn = lambda *shape: torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype)  # noqa: E731
    n, cached = 5, 0 if how == "causal" else 7
    (h, g), m = heads, n + cached
    q, k, v = drawn(h, n, 8), drawn(g, m, 8), drawn(g, m, 6 if how in ("softcap", "sinks") else 8)
    mask = ancestor_mask(2, (1, 1, 2), cached) if how != "causal" else ancestor_mask(n, (), 0)
    sinks = drawn(h) if how == "sinks" else None
    cap = 2.0 if how == "softcap" else None
    given_mask = None if how in ("causal", "all") else mask
    found = attend(q, k, v, given_mask, scale=0.3, causal=how == "causal", softcap=cap, sinks=sinks, fold=how == "fold")
    seen = torch.ones_like(mask) if how == "all" else mask
    close = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), plain_attention(q, k, v, seen, 0.3, cap, sinks), rtol=0, atol=close)


# -------------------------------------------------------------------------------------------------------------- caches
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_written_are_read_back_and_kept_ones_stay(dtype: torch.dtype) -> None:
    cache = RowCache(2, 3, 2, 9, 4, dtype, torch.device("cpu"))
    rows = torch.randn(6, 2, 2, 2, 4).to(dtype)  # row, layer, keys and values, heads, size
    cache.append(1, rows[:3, :, 0], rows[:3, :, 1])
    cache.append(1, rows[3:4, :, 0], rows[3:4, :, 1])
    assert cache.length == [0, 4, 0]
    for _ in range(2):  # what is written behind the kept rows leaves no trace
        keys, values = cache.write(1, 1, 4, rows[4:, 1, 0], rows[4:, 1, 1])
        assert torch.equal(keys, rows[:, 1, 0].transpose(0, 1)) and torch.equal(values, rows[:, 1, 1].transpose(0, 1))
    assert cache.length == [0, 4, 0] and not cache.k[0, 1, :, 4:].any() and not cache.k[:, [0, 2]].any()
    cache.release([1])
    assert cache.length == [0, 0, 0]


def test_a_segment_that_does_not_continue_or_fit_is_refused() -> None:
    rows = Rows.assemble([1], [[5, 6, 7]], [4], Draft.empty(1))
    check_room(rows, [0, 4], 7)
    with pytest.raises(CapacityError, match="slot 1 holds 3 tokens, the step expects 4"):
        check_room(rows, [0, 3], 7)
    with pytest.raises(CapacityError, match="slot 1 has room for 6 tokens, 7 are needed"):
        check_room(rows, [0, 4], 6)
    check_kept(1, 4, [0, 4])
    for kept in (-1, 5):
        with pytest.raises(CapacityError, match="slot 1 holds 4 tokens, cannot keep"):
            check_kept(1, kept, [0, 4])


# ----------------------------------------------------------------------------------------------- positions, fused layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_turns_like_the_formula(dtype: torch.dtype) -> None:
    """Pairs (i, i + half) are turned by their angle; the table's turn and the plain one agree up to a rounding."""
    position, x = torch.tensor([0, 3, 17, 3]), torch.randn(4, 3, 8, dtype=dtype)
    inv_freq = rope.frequencies(8, 100.0).to(dtype)
    cos, sin = rope.rotation(position, inv_freq)
    plain = rope.turn(x, cos, sin)
    angle = position[:, None] * inv_freq.double()
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double()) * torch.exp(1j * angle)[:, None]
    torch.testing.assert_close(plain.double(), torch.cat([pairs.real, pairs.imag], -1), rtol=0, atol=1e-5)
    served = rope.rotate(x, *rope.angles(rope.table(inv_freq, 20), position))
    torch.testing.assert_close(served, plain, rtol=0, atol=1e-6)
    scaled = rope.rotate(x, *rope.angles(rope.table(inv_freq, 20, 2.0), position))
    torch.testing.assert_close(scaled, 2 * served, rtol=1e-5, atol=1e-6)


class Layer(nn.Module):
    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(32), nn.RMSNorm(32)
        self.self_attn, self.mlp = nn.Module(), Mlp(32, 48)
        for name, out in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
            self.self_attn.add_module(name, nn.Linear(32, out, bias=False))
        self.self_attn.add_module("o_proj", nn.Linear(32, 32, bias=False))
        if normed:
            self.self_attn.add_module("q_norm", nn.RMSNorm(8))
            self.self_attn.add_module("k_norm", nn.RMSNorm(8))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("n", [1, 5])
def test_a_fused_layer_is_the_layer(n: int, normed: bool) -> None:
    torch.manual_seed(n)
    layer = Layer(normed).double().requires_grad_(False)
    for p in layer.parameters():
        p.normal_()
    fused, x, seen = FusedLayer.of(layer), torch.randn(n, 32).double(), torch.randn(n, 32).double()
    attn = layer.self_attn
    y = layer.input_layernorm(x)
    qkv = fused.qkv(fused.norm1(x))
    torch.testing.assert_close(qkv, torch.cat([attn.q_proj(y), attn.k_proj(y), attn.v_proj(y)], -1))
    if normed:
        qk = qkv[:, :48].unflatten(-1, (6, 8))
        q, k = attn.q_norm(qk[:, :4]), attn.k_norm(qk[:, 4:])
        assert fused.qk_norm is not None and torch.equal(fused.qk_norm(qk), torch.cat([q, k], 1))
    else:
        assert fused.qk_norm is None
    z = x + attn.o_proj(seen)
    torch.testing.assert_close(fused.leave(seen, x), z + layer.mlp(layer.post_attention_layernorm(z)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_the_formula(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 2, 8).to(dtype), torch.randn(2, 8).to(dtype)
    plain = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight.double()
    found = rms_norm(weight, 1e-3)(x)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), plain, rtol=0.02 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ what the package knows
PLAIN = {"Rows", "Segment", "Scores"}
"""What it may know of `outrider.types`: rows, and nothing of drafts and verdicts."""


def test_it_imports_nothing_that_drafts_verifies_or_is_a_model() -> None:
    found = 0
    for path in sorted(Path(outrider.nn.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = node.module if isinstance(node, ast.ImportFrom) else None
            for name in names if module == "outrider.types" else ():
                assert name in PLAIN, f"{path.name} imports {name}"
            for full in [f"{module}.{n}" for n in names] if module else names:
                if full.startswith("outrider."):
                    home = full.split(".")[1]
                    found += 1
                    assert home in {"nn", "types", "protocols", "errors", "isa", "files"}, f"{path.name} imports {full}"
    assert found > 10


def test_the_scored_rows_are_the_last_ones_or_not() -> None:
    """`last_scored` says so for whatever lies in a step: chunks that are not scored, trees, several sequences."""
    g, seen = random.Random(0), Counter[bool]()
    for _ in range(400):
        trees: list[Tree] = []
        scored = [g.random() < 0.7 for _ in range(g.randint(1, 3))]
        for wanted in scored:
            nodes = g.choice((0, 0, 1, 3))
            if wanted:
                trees.append(([7] * nodes, [g.randint(-1, k - 1) for k in range(nodes)]))
        prefixes = [[5] * g.choice((1, 1, 4)) for _ in scored]
        rows = Rows.assemble(list(range(len(scored))), prefixes, [9] * len(scored), Draft.join(trees), scored)
        found, count = rows.scored.tolist(), len(rows.scored)
        are_last = count > 0 and found == list(range(rows.count - count, rows.count))
        assert last_scored(rows) == (count if are_last else None)
        if count > 1:  # a drafter asks for some of them alone
            assert last_scored(replace(rows, scored=rows.scored[1:])) is None
        seen[are_last] += 1
    assert min(seen.values()) > 100


def test_a_forward_in_parts_is_that_of_the_whole() -> None:
    """Logits and hidden states in the order asked for, also where some of the scored rows are wanted alone, in any order."""

    def run(rows: Rows) -> Scores:
        return Scores(torch.stack([rows.token, rows.position], 1)[rows.scored], (rows.token[:, None],))

    g = random.Random(1)
    for _ in range(100):
        wanted = [g.random() < 0.8 for _ in range(4)]
        trees = [([g.randrange(99) for _ in range(n)], range(-1, n - 1)) for n in g.choices((0, 1, 3), k=sum(wanted))]
        prefixes = [[g.randrange(99) for _ in range(g.choice((1, 4)))] for _ in wanted]
        rows = Rows.assemble([0, 1, 2, 3], prefixes, [g.randrange(9) for _ in wanted], Draft.join(trees), wanted)
        some = replace(rows, scored=rows.scored[g.sample(range(len(rows.scored)), len(rows.scored) // 2)])
        for asked in (rows, some):
            whole, parts = run(asked), run_parts(asked, [([1], run), ([0, 2, 3], run)])
            assert torch.equal(parts.logits, whole.logits)
            assert torch.equal(parts.hidden[0], whole.hidden[0])
