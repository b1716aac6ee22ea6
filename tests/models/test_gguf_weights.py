"""GGUF files hold the checkpoint they were made from: bit for bit in float32, as its blocks say in the other types."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from outrider.errors import CapacityError, ConfigError
from outrider.models.checkpoint import Checkpoint
from outrider.models.convert import TYPES, convert
from outrider.models.decoder import taken
from outrider.models.gguf.checkpoint import GgufCheckpoint
from outrider.models.gguf.weights import Weights
from outrider.models.load import inspect_checkpoint, load_target
from outrider.models.native.build import load_library
from outrider.models.rotary import halves
from outrider.nn import memory
from outrider.nn.blocks import BLOCKS, dequantise, named, quantise
from outrider.types import Draft, Rows
from tests.checkpoints import edit_config
from tests.gguf_files import make_pair

pytest.importorskip("gguf")
SCALING = {"rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 300.0,
    "short_factor": [1.0, 1.5, 2, 2.5, 3, 3.5],
    "long_factor": [2.0] * 6,
}
CASES = {
    "llama": ("llama", {}),
    "llama tied, biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama one key head": ("llama", {"num_key_value_heads": 1, "head_dim": 14}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0}}),
    "llama 3": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0} | SCALING},
    ),
    "llama yarn": ("llama", {"rope_parameters": {"rope_type": "yarn"} | SCALING}),
    "llama yarn, the context it was trained with": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}),
    "llama yarn, factor by the contexts": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn"} | SCALING | {"factor": None}},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
    "mistral window": ("mistral", {"sliding_window": 6}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 16, "layer_types": None}),
    "gemma3 of 62 layers": (
        "gemma3_text",
        {"num_hidden_layers": 62, "query_pre_attn_scalar": 12, "layer_types": None, "intermediate_size": 8},
    ),
    "phi3": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}}),
    "phi3 longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {"no_rope_layers": None, "num_hidden_layers": 5}),
    "glm4": ("glm4", {}),
    "mixtral": ("mixtral", {"sliding_window": 6}),
    "qwen3 experts": ("qwen3_moe", {"norm_topk_prob": True}),
    "olmoe": ("olmoe", {}),
    "qwen2moe": ("qwen2_moe", {}),
    "gpt-oss": ("gpt_oss", {"swiglu_limit": 7.0}),
}


def tensors(weights: object) -> list[tuple[str, torch.Tensor]]:
    """Every tensor of a decoder's weights with a name."""
    out = []
    for field in fields(weights):  # type: ignore[arg-type]
        value = getattr(weights, field.name)
        if isinstance(value, torch.Tensor):
            out.append((field.name, value))
        elif isinstance(value, tuple):
            out += [(f"{field.name}.{i}.{n}", t) for i, layer in enumerate(value) for n, t in tensors(layer)]
    return out


@pytest.mark.parametrize("case", CASES)
def test_float32_files_are_the_checkpoint(case: str, tmp_path: Path) -> None:
    family, overrides = CASES[case]
    source, file = make_pair(tmp_path, family, **overrides)
    ours, theirs = GgufCheckpoint(file), Checkpoint(source, max_length=64 if "longrope" in case else None)
    a, b = ours.config, theirs.config
    same = (
        "family",
        "vocab_size",
        "hidden",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "inner",
        "window",
        "turns",
        "activation",
        "embed_scale",
        "experts",
    )
    assert a.max_length == (64 if "longrope" in case else b.max_length)
    assert [getattr(a, name) for name in same] == [getattr(b, name) for name in same]
    assert a.eps == pytest.approx(b.eps, rel=1e-7)
    assert a.rope_scale == pytest.approx(b.rope_scale, rel=1e-6)
    assert torch.allclose(a.inv_freq, b.inv_freq, rtol=3e-7, atol=0)
    for name in ("attention_cap", "logit_cap", "residual_scale", "logit_scale"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-6)
    scales = [c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale for c in (a, b)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-6)
    if b.local_freq is not None:
        assert a.local_freq is not None and torch.allclose(a.local_freq, b.local_freq, rtol=3e-7, atol=0)
    left, right = tensors(ours.read(torch.float32)), tensors(theirs.read(torch.float32))
    assert [name for name, _ in left] == [name for name, _ in right] and len(left) > 20
    for (name, x), (_, y) in zip(left, right, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "mxfp4"])
def test_every_type_reads_as_its_blocks_say(kind: str, tmp_path: Path) -> None:
    source, file = make_pair(tmp_path, kind=kind, hidden_size=256, intermediate_size=288, num_hidden_layers=1)
    weights, plain = Weights(file), Checkpoint(source)
    for name in ("ffn_gate", "ffn_down", "attn_output"):
        theirs = {"ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj", "attn_output": "self_attn.o_proj"}[name]
        x = plain.tensor(f"model.layers.0.{theirs}.weight")
        stored = weights.tensors[f"blk.0.{name}.weight"]
        wide = stored.block.values == 256
        assert stored.block.name == kind or (not wide and kind.endswith("_k") and name == "ffn_down")
        assert torch.equal(weights.numbers(f"blk.0.{name}.weight"), dequantise(quantise(x, stored.block), stored.block))
    assert weights.tensors["blk.0.attn_norm.weight"].block.name == "f32"
    target = load_target(file, dtype="float32")
    rows = Rows.assemble([0], [[3, 5, 7]], [0], Draft.empty(1))
    logits = target.forward(rows, target.new_kv(1, 8)).logits
    reference = load_target(source, dtype="float32")
    expected = reference.forward(rows, reference.new_kv(1, 8)).logits
    error = float((logits - expected).std() / expected.std())
    assert error < {"f32": 1e-5, "f16": 2e-3, "bf16": 2e-2, "q8_0": 3e-2, "q6_k": 0.1}.get(kind, 0.5)
    facts = inspect_checkpoint(file)
    assert (facts.runtime, facts.parameters) == ("lean", plain.parameters)


def test_memory_is_what_the_weights_take_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types without products are widened to float32, and without the native decoder so is every type; else a file's bytes count."""
    for kind in ("q8_0", "f16"):
        (tmp_path / kind).mkdir()
        make_pair(tmp_path / kind, kind=kind, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    small, wide = (inspect_checkpoint(tmp_path / kind / "model.gguf", dtype="float32") for kind in ("q8_0", "f16"))
    assert wide.weights_bytes == 4 * wide.parameters
    if load_library() is not None:
        assert small.weights_bytes == sum(t.bytes for t in Weights(tmp_path / "q8_0" / "model.gguf").tensors.values())
        monkeypatch.setattr(memory, "available_memory", lambda device="cpu": wide.weights_bytes - 1)
        load_target(tmp_path / "q8_0" / "model.gguf", dtype="float32")
    monkeypatch.setattr(memory, "available_memory", lambda device="cpu": wide.weights_bytes - 1)
    with pytest.raises(CapacityError, match="weights of the model"):
        load_target(tmp_path / "f16" / "model.gguf", dtype="float32")
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")
    with pytest.raises(CapacityError, match="weights of the model"):
        load_target(tmp_path / "q8_0" / "model.gguf", dtype="float32")


def test_segments_keep_their_types(tmp_path: Path) -> None:
    """A fused layer is its parts one below the other, each in its own type, and rows of queries are moved whole."""
    source, file = make_pair(tmp_path, kind="q4_0", hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    found = GgufCheckpoint(file).layer(0)
    qkv = taken(found.qkv)
    assert [s.block.name for s in qkv] == ["q4_0"] * 3
    assert [s.outputs for s in qkv] == [64, 32, 32] and qkv[0].inputs == 64
    x = Checkpoint(source).tensor("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(qkv[0].rows, quantise(x, named("q4_0")))


def test_rows_are_permuted_as_llama_cpps_converter_does() -> None:
    """Its formula, in numpy: view [heads, 2, half], swap."""
    rows = np.arange(24 * 5, dtype=np.uint8).reshape(24, 5)
    stored = rows.reshape(3, 2, 4, 5).swapaxes(1, 2).reshape(24, 5)
    assert np.array_equal(halves(torch.from_numpy(stored.copy()), 3, 8, 8).numpy(), rows)


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    _, file = make_pair(tmp_path, kind="q8_0", hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    place = Weights(file).tensors["blk.0.ffn_up.weight"].offset
    data = bytearray(file.read_bytes())
    data[place + 34 : place + 36] = b"\x00\x7e"  # NaN
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"ffn_up\.weight.*no finite number"):
        load_target(file)


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source, _ = make_pair(tmp_path)
    with pytest.raises(ConfigError, match="choose one of"):
        convert(source, tmp_path / "other.gguf", "q2_k")
    with pytest.raises(ConfigError, match="has no experts"):
        convert(source, tmp_path / "other.gguf", "mxfp4")
    (source / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
    with pytest.raises(ConfigError, match="no merges"):
        convert(source, tmp_path / "other.gguf", "q8_0")
    (source / "tokenizer.json").write_text('{"model": {"type": "BPE", "merges": []}}')
    with pytest.raises(ConfigError, match="it is damaged: KeyError 'vocab'"):
        convert(source, tmp_path / "other.gguf", "q8_0")
    (source / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(ConfigError, match="not BPE"):
        convert(source, tmp_path / "other.gguf", "q8_0")
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace('"llama"', '"gpt2"'))
    with pytest.raises(ConfigError, match="model_type 'gpt2'.*llama.cpp's converter"):
        convert(source, tmp_path / "other.gguf", "q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "source"]


def test_scaled_positions_of_an_older_gemma3_are_written(tmp_path: Path) -> None:
    """transformers 4 has its rotary parameters beside each other."""
    source, _ = make_pair(tmp_path, "gemma3_text", **CASES["gemma3"][1])
    old = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 5e5, "rope_local_base_freq": 2e3}
    edit_config(source, ("rope_parameters",), **old)
    convert(source, tmp_path / "old.gguf", "f32")
    ours, theirs = GgufCheckpoint(tmp_path / "old.gguf").config, Checkpoint(source).config
    assert torch.allclose(theirs.inv_freq[:1], torch.tensor([1 / 8]))
    for a, b in ((ours.inv_freq, theirs.inv_freq), (ours.local_freq, theirs.local_freq)):
        assert a is not None and b is not None and torch.allclose(a, b, rtol=3e-7, atol=0)


def test_scalings_that_have_no_key_are_refused(tmp_path: Path) -> None:
    source, _ = make_pair(tmp_path, "gemma3_text", **CASES["gemma3"][1])
    local = {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}
    edit_config(source, (), rope_parameters=local)
    with pytest.raises(ConfigError, match="no key here"):
        convert(source, tmp_path / "other.gguf", "f32")
    source, _ = make_pair(tmp_path / "phi", "phi3", **CASES["phi3 longrope"][1])
    edit_config(source, (), rope_parameters=LONG | {"long_factor": None})
    with pytest.raises(ConfigError, match="long_factor must list 6 numbers"):
        convert(source, tmp_path / "other.gguf", "f32")


FULL = {"sliding_window": None, "layer_types": ["full_attention"] * 3}


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "gemma3_text", "qwen2"])
def test_a_folder_without_its_familys_windows(family: str, tmp_path: Path) -> None:
    """Where readers of GGUF take a window for given it is refused, else the file has none either."""
    sizes = {"gpt_oss": {"swiglu_limit": 7.0}, "qwen2": {}}.get(family, {"query_pre_attn_scalar": 16})
    source, _ = make_pair(tmp_path, family, **(sizes | ({"layer_types": None} if family == "gemma3_text" else {})))
    edit_config(source, (), **FULL)
    assert not any(Checkpoint(source).config.window)
    if family in ("gemma2", "gpt_oss"):
        with pytest.raises(ConfigError, match="no sliding window, and readers of GGUF take one for given"):
            convert(source, tmp_path / "other.gguf", "f32")
        return
    convert(source, tmp_path / "other.gguf", "f32")
    assert GgufCheckpoint(tmp_path / "other.gguf").config.window == (0, 0, 0)


def test_what_would_be_read_back_otherwise_is_not_written(tmp_path: Path) -> None:
    """Qwen2's windows: files of its architecture have no key that switches them on."""
    source, _ = make_pair(tmp_path, "qwen2")
    edit_config(source, ("layer_types",), use_sliding_window=True, sliding_window=7, max_window_layers=0)
    assert Checkpoint(source).config.window == (7, 7, 7)
    with pytest.raises(ConfigError, match="GGUF says its window otherwise"):
        convert(source, tmp_path / "other.gguf", "f32")
    assert not (tmp_path / "other.gguf").exists()


def test_splits(tmp_path: Path) -> None:
    """A split set is found by any of its parts, and is refused when it is not whole."""
    gguf = pytest.importorskip("gguf")
    _, file = make_pair(tmp_path)
    weights = Weights(file)
    writer = gguf.GGUFWriter(tmp_path / "parts.gguf", "llama", split_max_tensors=12)
    for key, value in weights.values.items():
        if key != "general.architecture":
            kind = {str: "string", bool: "bool", int: "uint32", float: "float32"}[type(value)]
            getattr(writer, f"add_{kind}")(key, value)
    for name in weights.tensors:
        writer.add_tensor(name, weights.numbers(name).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) > 1
    whole = tensors(GgufCheckpoint(file).read(torch.float32))
    for (name, x), (_, y) in zip(tensors(GgufCheckpoint(parts[1]).read(torch.float32)), whole, strict=True):
        assert torch.equal(x, y), name
    parts[1].rename(tmp_path / "away")
    with pytest.raises(ConfigError, match="is missing, one of the"):
        load_target(parts[0])
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(ConfigError, match="do not belong together"):
        load_target(parts[0])


def test_every_type_of_ggml_has_a_size_that_fits() -> None:
    assert all(block.bytes <= 292 and block.values in (1, 32, 256) for block in BLOCKS.values())
