"""A target with quantised weights through the decoder and the engine: the same bits and the same text in any company."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from outrider.assets import shipped
from outrider.build import Engine, build_engine, companion
from outrider.errors import ConfigError
from outrider.models.decoder import DecoderWeights, LayerWeights, Segments, unpacked
from outrider.models.gguf.checkpoint import GgufCheckpoint
from outrider.models.lean import LeanTarget
from outrider.models.load import load_target
from outrider.models.native.build import load_library
from outrider.models.quantised import QUANTIZE, distance, quantised
from outrider.nn.blocks import BLOCKS, named
from outrider.params import SamplingParams
from outrider.types import Draft, Rows
from tests.gguf_files import make_pair
from tests.models.test_native import SHAPES, forest, paths_of, random_weights, shape, tokens
from tests.models.test_packed_products import blocks

pytestmark = pytest.mark.skipif(load_library() is None, reason="products in blocks need a C++ compiler")
PROMPTS = [[5, 9, 300, 7], [11] * 9, [250, 3, 3, 90, 4, 1, 70], [800], [2, 40, 41, 42, 43]]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def mixed(hidden: int = 256, dtype: torch.dtype = torch.bfloat16, twice: bool = False) -> LeanTarget:
    """A small model whose linears hold segments of several types each, heads of 40 that are no whole groups, and plain parts.

    twice: products round their inputs to 16 bits."""
    config = shape(hidden=hidden, heads=4, kv_heads=2, head_dim=40, inner=288, vocab_size=131, layers=2)
    kinds = iter(range(100))

    def linear(inputs: int, *types: tuple[str, int]) -> Segments:
        def part(name: str, outputs: int) -> object:
            return blocks(named(name), outputs, inputs, seed=next(kinds))

        return tuple(part(*one) for one in types)  # type: ignore[return-value]

    def layer(q: str, v: str, down: str) -> LayerWeights:
        ones = torch.ones(hidden)
        return LayerWeights(
            norm1=ones, qkv=linear(hidden, (q, 160), (q, 80), (v, 80)), qkv_bias=0.1 * torch.arange(320).sin(), q_norm=None,
            k_norm=None, o=linear(160, ("q5_0", hidden)), o_bias=None, norm2=ones,
            gate_up=linear(hidden, (q, 288), (v, 288)), down=linear(288, (down, hidden)),
        )  # fmt: skip

    layers = (layer("q4_k", "q6_k", "q8_0"), layer("q5_k", "q4_1", "int8"))
    embedding = linear(hidden, ("q6_k", 131))
    return LeanTarget(config, DecoderWeights(embedding, layers, torch.ones(hidden), embedding, dtype, twice=twice))


@pytest.mark.parametrize("twice", [False, True], ids=["8 bits", "16 bits"])
def test_rows_have_the_same_bits_in_any_company(twice: bool, threads: None) -> None:
    """Chunks, a tree and a chain in one forward against each row's path decoded token by token, on 1, 2 and 3 threads."""
    target, history = mixed(twice=twice), {0: tokens(11, 131), 1: tokens(3, 131, seed=2)}
    for on in (1, 2, 3):
        torch.set_num_threads(on)
        kv = target.new_kv(2, 64)
        feed = Rows.assemble([0, 1], list(history.values()), [0, 0], Draft.empty(0), [False] * 2)
        target.forward(feed, kv)
        kv.commit(feed, [()] * 2)
        draft = forest(([5, 6, 7, 8, 9, 1, 2], [-1, -1, 0, 0, 1, 3, 5]), ([1, 2, 0], [-1, 0, 1]))
        rows = Rows.assemble([0, 1], [[2], [1, 1]], [11, 3], draft)
        scores = target.forward(rows, kv, layers=(0, 2))
        paths = paths_of(rows, history)
        for m, row in enumerate(rows.scored.tolist()):
            alone = target.new_kv(1, 64)
            for at, token in enumerate(paths[row]):
                one = Rows.assemble([0], [[token]], [at], Draft.empty(1))
                last = target.forward(one, alone, layers=(0, 2))
                alone.commit(one, [()])
            assert torch.equal(last.logits[0], scores.logits[m])
            assert torch.equal(last.hidden[1][0], scores.hidden[1][row])


def test_long_prompts_too() -> None:
    """300 rows at once and one by one: a prompt takes the same kernels."""
    target, text = mixed(dtype=torch.float32), tokens(300, 131)
    at_once, alone = target.new_kv(1, 320), target.new_kv(1, 320)
    rows = Rows.assemble([0], [text], [0], Draft.empty(1))
    whole = target.forward(rows, at_once)
    for at, token in enumerate(text):
        one = Rows.assemble([0], [[token]], [at], Draft.empty(1))
        last = target.forward(one, alone)
        alone.commit(one, [()])
    assert torch.equal(whole.logits, last.logits)
    at_once.commit(rows, [()])
    assert all(map(torch.equal, at_once.entries(0, 300), alone.entries(0, 300)))


@pytest.mark.parametrize("name", QUANTIZE)
def test_near_its_values_in_plain_products(name: str) -> None:
    """Rounded weights in blocks against the same values as float32: only the rounding of inputs is between them."""
    config, extras = SHAPES["one head each"]
    weights = random_weights(config, extras, torch.float32)
    near = LeanTarget(config, unpacked(quantised(weights, name)))
    far = distance(near, LeanTarget(config, quantised(weights, name)), tokens(48, config.vocab_size))
    assert 0 < far.kl < 0.02 and far.tv < 0.05


def test_inputs_of_16_bits_are_nearer_to_the_values() -> None:
    """One in 256 of what 8 bits move the logits, and then some for sums in float32."""
    config, extras = SHAPES["one head each"]
    weights, text = random_weights(config, extras, torch.float32), tokens(48, config.vocab_size)
    values = LeanTarget(config, unpacked(quantised(weights, "q4_k")), native=False)
    rows = replace(Rows.assemble([0], [text], [0], Draft.empty(1)), scored=torch.arange(len(text)))

    def moved(twice: bool) -> float:
        target = LeanTarget(config, quantised(replace(weights, twice=twice), "q4_k"))
        a, b = (t.forward(rows, t.new_kv(1, 48)).logits for t in (values, target))
        return float((a - b).square().mean().sqrt() / a.std())

    assert 1e-3 < moved(False) < 0.1 and moved(True) < moved(False) / 100


def test_the_option_of_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For files and rounded weights, and said; refused where nothing is rounded, and for other numbers."""
    (tmp_path / "whole").mkdir()
    _, whole = make_pair(tmp_path / "whole", "llama", "f32", hidden_size=64, intermediate_size=96)
    source, file = make_pair(tmp_path, "llama", "q8_0", hidden_size=64, intermediate_size=96)
    for path, quantize in ((file, None), (source, "q8_0")):
        fine = load_target(path, dtype="float32", quantize=quantize, input_bits=16)
        plain = load_target(path, dtype="float32", quantize=quantize)
        a, b = (
            t.forward(Rows.assemble([0], [[5, 6, 7]], [0], Draft.empty(1)), t.new_kv(1, 8)).logits
            for t in (fine, plain)
        )
        assert not torch.equal(a, b)
        assert any("to 16 bits" in notice for notice in fine.notices)
        assert not any("bits" in notice for notice in plain.notices)
    with pytest.raises(ConfigError, match="input_bits 16 is for weights in blocks"):
        load_target(whole, input_bits=16)
    with pytest.raises(ConfigError, match="input_bits 16 is for weights in blocks"):
        load_target(source, input_bits=16)
    with pytest.raises(ConfigError, match="input_bits must be 8 or 16"):
        build_engine(str(file), draft="none", input_bits=12)
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")
    assert any("changes nothing here" in notice for notice in load_target(file, input_bits=16).notices)


@pytest.mark.parametrize("kind", ["q8_0", "q4_k"])
def test_a_file_and_rounding_at_load_give_the_same_bits(kind: str, tmp_path: Path) -> None:
    """The checkpoint converted to a file of this type, beside the same checkpoint rounded to it while it is loaded."""
    source, file = make_pair(tmp_path, "llama", kind, hidden_size=256, intermediate_size=320, dtype=torch.bfloat16)
    stored, rounded = load_target(file, dtype="bfloat16"), load_target(source, dtype="bfloat16", quantize=kind)
    text = tokens(20, stored.vocab_size)
    rows = Rows.assemble([0], [text], [0], Draft.empty(1))
    a, b = (t.forward(rows, t.new_kv(1, 32)).logits for t in (stored, rounded))
    assert torch.equal(a, b)
    near = LeanTarget(GgufCheckpoint(file).config, GgufCheckpoint(file).read(torch.float32))
    far = distance(near, stored, text)
    assert 0 < far.kl < 0.01


def test_embedding_and_head_are_of_the_same_model() -> None:
    target = mixed(dtype=torch.float32)
    rows, kv = Rows.assemble([0], [[7, 90]], [0], Draft.empty(1)), target.new_kv(1, 8)
    scores = target.forward(rows, kv, layers=(0, 2))
    assert torch.equal(target.embed(torch.tensor([7, 90])), scores.hidden[0])
    assert torch.allclose(
        target.unembed(scores.hidden[1][-1:]), scores.logits, rtol=1e-2, atol=1e-2 * float(scores.logits.std())
    )


@pytest.fixture(scope="module", params=["q8_0", "q4_0"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return build_engine(
        shipped("target"),
        draft=str(shipped("draft")),
        slots=3,
        max_length=96,
        target_quantize=request.param,
        draft_quantize="q4_0",
    )


def texts(engine: Engine, **params: object) -> list[tuple[int, ...]]:
    asked = SamplingParams(max_tokens=24, **params)  # type: ignore[arg-type]
    return [result.outputs[0].token_ids for result in engine.generate(PROMPTS, asked)]


def test_greedy_text_is_that_of_plain_decoding(engine: Engine) -> None:
    plain = texts(companion(engine, "none"), temperature=0.0)
    for length in (1, 3, 7):
        assert texts(companion(engine, length=length), temperature=0.0) == plain


def test_coupled_text_is_that_of_plain_decoding_at_temperature_1(engine: Engine) -> None:
    """The rule `match` samples the target's own text, token for token: so its distribution is the target's."""
    plain = texts(companion(engine, "none", rule="match"), temperature=1.0, seed=5)
    assert texts(companion(engine, rule="match", length=3), temperature=1.0, seed=5) == plain


def test_says_what_rounding_has_changed(engine: Engine) -> None:
    (told,) = [n for n in engine.notices if "rounded to" in n]
    assert "mean KL" in told and "total variation" in told and "another model" in told


def test_says_which_types_are_widened() -> None:
    config, extras = SHAPES["one head each"]
    rounded = lambda: quantised(random_weights(config, extras, torch.float32), "q8_0")  # noqa: E731
    odd = replace(rounded(), embedding=(blocks(named("iq4_nl"), config.vocab_size, config.hidden),))
    assert any("iq4_nl" in n and "float32" in n for n in LeanTarget(config, odd).notices)
    assert not any("float32" in n for n in LeanTarget(config, rounded()).notices)


def test_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'q8_0'"):
        load_target(shipped("target"), quantize="q8")
    with monkeypatch.context() as patched:  # of a machine with a GPU
        patched.setattr("outrider.models.load.device_named", lambda name: torch.device("meta"))
        with pytest.raises(ConfigError, match="CPU only"):
            load_target(
                shipped("target"), quantize="q8_0", device="cuda", progress=lambda _: pytest.fail("weights are read")
            )
    with pytest.raises(ConfigError, match="fixed when the target was loaded"):
        companion(build_engine(draft="none", slots=1, max_length=32), target_quantize="q8_0")
    assert {named(kind).number for kind in QUANTIZE.values() if kind != "int8"} <= BLOCKS.keys()
