"""Keys and values in other types than the weights: codes of 8 bits against their twin, bits in any company, texts of an engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from outrider.build import Engine, build_engine
from outrider.control.fixed import Fixed
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.errors import ConfigError
from outrider.models.lean import LeanTarget
from outrider.nn.kv import PagedKV
from outrider.nn.stored import KV_DTYPES, Coded, Plain, stored_as
from outrider.params import SamplingParams
from outrider.protocols import Target
from outrider.types import Draft, Rows
from outrider.verify import load_rule
from tests.models.test_long_context import BEHIND, PATHS, TREE
from tests.models.test_native import SHAPES, forest, paths_of, pytestmark, random_weights, tokens  # noqa: F401

OTHERS = ("float32", "bfloat16", "int8")
WEIGHTS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def lean(name: str, dtype: torch.dtype, kv_dtype: str, native: bool = True) -> LeanTarget:
    config, extras = SHAPES[name]
    target = LeanTarget(config, random_weights(config, extras, dtype), native=native)
    assert (target.native is not None) == native
    return target.storing(kv_dtype)


def feed(target: Target, kv: PagedKV, slot: int, text: list[int]) -> Tensor:
    """Append a text to a slot; the logits behind it."""
    rows = Rows.assemble([slot], [text], [kv.length[slot]], Draft.empty(1))
    logits = target.forward(rows, kv).logits[0]
    kv.commit(rows, [()])
    return logits


# ------------------------------------------------------------------------------------------------------------- what is stored


def test_a_number_is_off_by_half_a_step_at_most() -> None:
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50)[:, None]
    back = Coded().unpack(Coded().pack(x), torch.float64)
    step = x.abs().amax(-1, keepdim=True).double() / 127
    assert ((back - x.double()).abs() <= 0.5001 * step).all()
    assert not ((back - x.double()).abs() <= 0.3 * step).all(), "negative control: the error is that of rounding"
    assert torch.equal(Coded().pack(torch.zeros(2, 8)), torch.zeros(2, 12, dtype=torch.int8))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_stays_none(odd: float) -> None:
    x = torch.ones(2, 8)
    x[0, 3] = odd
    back = Coded().unpack(Coded().pack(x), torch.float32)
    assert back[0].isnan().all() and torch.equal(back[1], x[1])


@WEIGHTS
@pytest.mark.parametrize("name", ["plain", "odd sizes", "one head each", "norms"])
def test_the_compiled_decoder_stores_what_the_twin_does(name: str, dtype: torch.dtype) -> None:
    """The first layer's keys and values depend on no cache: those of a float32 cache, packed by the twin, to the bit."""
    config, _ = SHAPES[name]
    text = tokens(40, config.vocab_size)
    wide, coded = (lean(name, dtype, kind) for kind in ("float32", "int8"))
    caches = []
    for target in (wide, coded):
        kv = target.new_kv(1, 64)
        feed(target, kv, 0, text)
        caches.append(kv)
    for part in ("k", "v"):
        numbers, entries = (getattr(kv, part)[0, :, :40] for kv in caches)
        assert torch.equal(Coded().pack(numbers), entries)
        assert entries.shape[-1] == config.head_dim + 4


@WEIGHTS
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(
    ("name", "behind"),
    [(name, 30) for name in ("plain", "odd sizes", "windows", "norms", "four norms, bounds, two frequencies")]
    + [(name, 603) for name in ("plain", "odd sizes", "one head each", "norms")],
)
def test_both_paths_are_one_model(name: str, behind: int, kind: str, dtype: torch.dtype) -> None:
    """The compiled decoder against PyTorch's operators over the same cache: a prompt, then a tree. Where many keys are turned:
    heads of 16, 24, 40 and 64 numbers, which are whole vectors of words with some instructions and not with others."""
    config, _ = SHAPES[name]
    compiled, plain = lean(name, dtype, kind), lean(name, dtype, kind, native=False)
    text = tokens(behind, config.vocab_size)
    kv, other = compiled.new_kv(1, behind + 34), plain.new_kv(1, behind + 34)
    feed(compiled, kv, 0, text)
    other.make_room(0, behind + 34)
    other.k[:], other.v[:], other.length[0] = kv.k, kv.v, behind
    tree = forest(([t % config.vocab_size for t in (5, 6, 7, 8)], [-1, -1, 0, 2]))
    rows = Rows.assemble([0], [[3]], [behind], tree)
    found, expected = compiled.forward(rows, kv).logits, plain.forward(rows, other).logits
    assert (found - expected).abs().max() <= (2e-3 if dtype is torch.float32 else 0.1) * expected.abs().max()


def test_a_narrower_cache_is_another_model() -> None:
    """Negative control of the test above: codes change what a model says, and by little."""
    text = tokens(40, SHAPES["plain"][0].vocab_size)
    wide, coded = (lean("plain", torch.float32, kind) for kind in ("auto", "int8"))
    apart = (feed(wide, wide.new_kv(1, 64), 0, text) - feed(coded, coded.new_kv(1, 64), 0, text)).abs().max()
    assert 1e-4 < float(apart) < 1.0


# ------------------------------------------------------------------------------------------------------------- bits in any company


@WEIGHTS
@pytest.mark.parametrize("name", ["plain", "odd sizes", "windows"])
def test_rows_have_the_bits_of_plain_decoding(name: str, dtype: torch.dtype, threads: None) -> None:
    """Two trees and a prompt in one forward, on 1, 2 and 3 threads and on small scattered pages, against each path alone."""
    config, _ = SHAPES[name]
    target = lean(name, dtype, "int8")
    history = {slot: tokens(n, config.vocab_size, seed=slot) for slot, n in ((0, 5), (2, 17))}
    trees = forest(([t % config.vocab_size for t in TREE[0]], TREE[1]), ([9, 1], [-1, -1]))
    rows = Rows.assemble(
        [2, 1, 0], [[3], tokens(13, config.vocab_size), [4, 2]], [17, 0, 5], trees, [True, False, True]
    )
    paths = paths_of(rows, history | {1: []})
    expected = {}
    for path in map(tuple, paths):
        kv = target.new_kv(1, 64)
        expected[path] = [feed(target, kv, 0, [token]) for token in path][-1], kv.k[:, :, : len(path)]
    for count, page in ((1, 64), (2, 3), (3, 64)):
        torch.set_num_threads(count)
        sizes = config.layers, 3, config.kv_heads, 64, config.head_dim
        kv = PagedKV(*sizes, dtype, torch.device("cpu"), page=page, stored=Coded())
        for slot, text in history.items():
            feed(target, kv, slot, text)
        logits = target.forward(rows, kv).logits
        for m, row in enumerate(rows.scored.tolist()):
            assert torch.equal(logits[m], expected[tuple(paths[row])][0]), f"row {row} on {count} threads"
        kv.commit(rows, [[0, 2], [], [0]])
        kept = (*history[2], 3, *(rows.token[1 + i].item() for i in (0, 2)))
        assert torch.equal(kv.k[:, :, kv.places(2, 0, len(kept))], expected[kept][1])


@WEIGHTS
@pytest.mark.parametrize("cached", BEHIND)
def test_a_node_has_the_bits_of_plain_decoding_across_parts(cached: int, dtype: torch.dtype) -> None:
    target = lean("plain", dtype, "int8")

    def filled() -> PagedKV:
        kv = target.new_kv(1, cached + 16)
        kv.make_room(0, cached + 16)
        noise = torch.Generator().manual_seed(0)
        for t in (kv.k, kv.v):
            t.copy_(kv.stored.pack(torch.randn(*t.shape[:-1], kv.head_dim, generator=noise)))
        kv.length[0] = cached
        return kv

    together = target.forward(Rows.assemble([0], [[3]], [cached], forest(TREE)), filled()).logits
    for node, path in PATHS.items():
        kv = filled()
        logits = [feed(target, kv, 0, [token]) for token in (3, *(TREE[0][k] for k in path))][-1]
        assert torch.equal(together[1 + node], logits)


# ------------------------------------------------------------------------------------------------------------- an engine


def engine(target: Target, drafter: object, **more: object) -> Engine:
    options = {"slots": 3, "max_length": 250, "chunk": 64, "allow_lossy": True, **more}
    return Engine(target, drafter, load_rule("match"), Fixed(4), **options)  # type: ignore[arg-type]


BEGINNING = tokens(130, 100, seed=5)
PROMPTS = [[*BEGINNING, 5, 9], [*BEGINNING[:70], 7], [*BEGINNING, 5, 9], [11] * 9, BEGINNING[:128]]


def texts(one: Engine) -> list[tuple[int, ...]]:
    """Of two rounds of the prompts, so that the second finds what the first has left; greedy and sampled."""
    p = [SamplingParams(temperature=i % 2, max_tokens=30, seed=i) for i in range(len(PROMPTS))]
    return [r.outputs[0].token_ids for _ in range(2) for r in one.generate(PROMPTS, p)]


def test_texts_do_not_depend_on_drafts_company_pages_or_room() -> None:
    """Plain decoding one by one without sharing, against drafts, shared beginnings, and pages for little more than one sequence."""
    target = lean("plain", torch.bfloat16, "int8")
    expected = texts(engine(target, NoDraft(), slots=1, prefix_cache=False))
    assert texts(engine(target, NGram(4, min_n=1))) == expected
    tight = engine(target, NGram(4, min_n=1), kv_memory=5.5 * 64 * target.token_bytes / 1e9)
    assert tight.parts.kv.pages.count == 5  # type: ignore[attr-defined]
    assert texts(tight) == expected
    assert tight.state.room.sums.preempted > 0
    wide = lean("plain", torch.bfloat16, "auto")
    assert texts(engine(wide, NoDraft())) != expected, "negative control: another cache says something else"


def test_memory_is_counted_in_true_bytes() -> None:
    config, _ = SHAPES["plain"]
    target = lean("plain", torch.bfloat16, "int8")
    assert target.token_bytes == 2 * config.layers * config.kv_heads * (config.head_dim + 4)
    kv = target.new_kv(4, 250, memory=6 * 64 * target.token_bytes + 5)
    assert kv.pages.count == 6
    assert kv.k.nbytes + kv.v.nbytes == 6 * 64 * target.token_bytes


# ------------------------------------------------------------------------------------------------------------- what is said


def test_names() -> None:
    assert [stored_as(name, torch.bfloat16, 16).name for name in KV_DTYPES] == ["bfloat16", *OTHERS]
    assert stored_as("auto", torch.float64, 3) == Plain(torch.float64)
    with pytest.raises(ConfigError, match="'int9'; did you mean 'int8'"):
        stored_as("int9", torch.float32, 16)
    with pytest.raises(ConfigError, match="heads of a multiple of 4 numbers, this model's have 18: leave kv_dtype out"):
        stored_as("int8", torch.float32, 18)


def test_an_engine_says_what_it_stores(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    one = build_engine(draft="none", kv_dtype="int8")
    told = [n for n in one.notices if "stored as int8" in n]
    assert len(told) == 1 and "another model: on 512 tokens of code, mean KL" in told[0]
    assert "int8 cache" in repr(one)
    same = build_engine(draft="none", kv_dtype=str(one.parts.target.dtype).removeprefix("torch."))
    assert not [n for n in same.notices if "stored as" in n]


def test_models_on_transformers_refuse_it() -> None:
    with pytest.raises(
        ConfigError, match="kv_dtype 'int8' needs the lean runtime, which does not run .* leave kv_dtype out"
    ):
        build_engine(draft="none", implementation="hf", kv_dtype="int8")
    with pytest.raises(ConfigError, match="'int9'; did you mean 'int8'"):
        build_engine(draft="none", kv_dtype="int9")


def test_a_target_object_has_its_cache() -> None:
    target = lean("plain", torch.float32, "auto")
    with pytest.raises(ConfigError, match="kv_dtype='int8' is for models that are loaded here"):
        build_engine(target, "none", kv_dtype="int8")
