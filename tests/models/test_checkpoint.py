"""Reading checkpoints: both spellings of the configuration, shards, dtypes, and refusing what is damaged or hostile."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.errors import CapacityError, ConfigError
from outrider.models.checkpoint import Checkpoint, load_checkpoint
from outrider.models.config import Unsupported, read_layout
from outrider.models.lean import LeanTarget
from outrider.models.load import load_target
from outrider.nn import memory
from outrider.types import Draft, Rows
from tests.checkpoints import edit_config, make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def copy(model, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


def logits(folder: Path, **options) -> torch.Tensor:
    target = LeanTarget(*load_checkpoint(folder, torch.float32, **options), native=False)
    return target.forward(Rows.assemble([0], [[5, 17, 3]], [0], Draft.empty(1)), target.new_kv(1, 8)).logits


# ---------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_old_spelling_of_rotary_parameters_reads_the_same(tmp_path, kind):
    rope = {"rope_type": kind, "factor": 4.0}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    folder = make_checkpoint(tmp_path, "llama", rope_parameters=rope | {"rope_theta": 777.0})
    new = read_layout(folder)
    edit_config(
        folder,
        ("rope_parameters", "dtype"),
        rope_theta=777.0,
        rope_scaling=rope | {"type": kind},
        torch_dtype="float16",
    )
    old = read_layout(folder)
    assert torch.equal(new.decoder.inv_freq, old.decoder.inv_freq)
    assert (new.stored, old.stored) == ("float32", "float16")
    edit_config(folder, (), rope_scaling={"type": kind} | {k: v for k, v in rope.items() if k != "rope_type"})
    assert torch.equal(new.decoder.inv_freq, read_layout(folder).decoder.inv_freq)


def test_absent_keys_have_the_defaults_of_transformers(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", num_key_value_heads=4)
    edit_config(folder, ("rope_parameters", "num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias"))
    layout = read_layout(folder)
    assert (layout.decoder.kv_heads, layout.decoder.head_dim, layout.tied, layout.o_bias) == (4, 12, False, False)
    assert layout.decoder.inv_freq[1].item() == pytest.approx(10000.0 ** (-1 / 6))


def test_shards_dtypes_and_progress(model, tmp_path):
    sharded = make_checkpoint(tmp_path, "llama", shards=4)
    assert len(list(sharded.glob("*.safetensors"))) >= 3
    seen: list[float] = []
    assert torch.equal(logits(sharded, progress=seen.append), logits(model))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    config, weights = load_checkpoint(model, torch.bfloat16)
    stored = load_file(model / "model.safetensors")
    assert weights.dtype is torch.bfloat16
    queries = weights.layers[1].qkv[: config.heads * config.head_dim]
    assert torch.equal(queries, stored["model.layers.1.self_attn.q_proj.weight"].bfloat16())


def test_tied_head_is_the_embedding_unless_both_are_stored_and_differ(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    weights = load_checkpoint(folder, torch.float32)[1]
    assert weights.head is weights.embedding
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": weights.embedding.clone()}, file)
    again = load_checkpoint(folder, torch.float32)[1]
    assert again.head is again.embedding
    save_file(tensors | {"lm_head.weight": weights.embedding + 1}, file)
    assert torch.equal(load_checkpoint(folder, torch.float32)[1].head, weights.embedding + 1)


def test_max_length_shortens_and_never_lengthens(model):
    assert load_checkpoint(model, torch.float32, max_length=99)[0].max_length == 99
    with pytest.raises(ConfigError, match="choose 1 to 256"):
        load_checkpoint(model, torch.float32, max_length=257)


_PEAK = """
import sys, torch
from pathlib import Path
from outrider.models.checkpoint import Checkpoint
from outrider.models.lean import LeanTarget
def kilobytes(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1])
LeanTarget(*(lambda c: (c.config, c.read(torch.float32)))(Checkpoint(Path(sys.argv[1]))), native=False)
before = kilobytes("VmRSS")
checkpoint = Checkpoint(Path(sys.argv[2]))
target = LeanTarget(checkpoint.config, lambda: checkpoint.read(torch.float32), native=False)
print((kilobytes("VmHWM") - before) * 1024, checkpoint.parameters * 4)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to see the peak of memory")
def test_peak_memory_of_loading_is_the_weights_and_little_more(model, tmp_path):
    """In a process of its own, packing included: the weights, and one of six blocks two or three times over."""
    big = make_checkpoint(
        tmp_path, hidden_size=640, intermediate_size=1792, num_hidden_layers=6, head_dim=160, dtype=torch.bfloat16
    )
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, str(model), str(big)], capture_output=True, text=True, check=True, timeout=300
    )
    peak, weights = (int(n) for n in run.stdout.split())
    assert weights > 100e6
    assert peak < 1.5 * weights


# --------------------------------------------------------------------------------------------------- what is not for us


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mamba"}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layers"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"per_layer_config": {"1": {"hidden_act": "gelu"}}}, "per_layer_config"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_unsupported_options_are_left_to_transformers(copy, changes, reason):
    edit_config(copy, (), **changes)
    with pytest.raises(Unsupported, match=reason):
        Checkpoint(copy)


def test_tensors_without_a_place_are_left_to_transformers(copy):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}, file)
    with pytest.raises(Unsupported, match="no place"):
        Checkpoint(copy)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, file)
    Checkpoint(copy)
    save_file(tensors | {"model.norm.weight": torch.ones(48, dtype=torch.int8)}, file)
    with pytest.raises(Unsupported, match="quantized"):
        Checkpoint(copy)


# ------------------------------------------------------------------------------------------- damaged and hostile folders


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def _huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10**12) + b"{}")


def _huge_tensor(folder: Path) -> None:
    header = json.dumps({"model.embed_tokens.weight": {"dtype": "F32", "shape": [10**12, 48], "data_offsets": [0, 16]}})
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(16))


def _drop(name: str):
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if k != name}, file)

    return damage


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _config(**changes):
    return lambda folder: edit_config(folder, (), **changes) and None


def _write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text) and None


def _index(file: str, tensor: str = "model.norm.weight"):
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {tensor: file}}))

    return damage


def _link_outside(folder: Path) -> None:
    real = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(real)
    (folder / "model.safetensors").symlink_to(real)


def _no_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _fifo(folder: Path) -> None:
    _no_file(folder)
    os.mkfifo(folder / "model.safetensors")


def _big_config(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(10 << 30)


HOSTILE = {
    "truncated weights": (_truncate, "damaged"),
    "header of a terabyte": (_huge_header, "damaged"),
    "tensor of a trillion rows": (_huge_tensor, "damaged"),
    "weights of zero bytes": (_write("model.safetensors", ""), "damaged"),
    "missing tensor": (_drop("model.layers.2.mlp.down_proj.weight"), "down_proj.weight is missing"),
    "missing head": (_drop("lm_head.weight"), "lm_head.weight is missing"),
    "pickle only": (_pickle_only, "safetensors"),
    "no weights": (_no_file, "no model.safetensors"),
    "weights that are a pipe": (_fifo, "is missing"),
    "shapes that disagree": (_config(intermediate_size=80), "config.json says"),
    "a trillion rows in the configuration": (_config(vocab_size=10**12), "vocab_size must be a whole number"),
    "a billion layers": (_config(num_hidden_layers=10**9), "num_hidden_layers"),
    "negative size": (_config(hidden_size=-48), "hidden_size"),
    "a size that is no number": (_config(hidden_size="48"), "hidden_size"),
    "not a number": (_config(rms_norm_eps=float("nan")), "rms_norm_eps"),
    "true for a number": (_config(num_attention_heads=True), "num_attention_heads"),
    "heads that do not divide": (_config(num_key_value_heads=3), "multiple of num_key_value_heads"),
    "a flag that is none": (_config(tie_word_embeddings="yes"), "true or false"),
    "own code": (_config(auto_map={"AutoModelForCausalLM": "evil.Model"}), "auto_map"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "configuration that is no JSON": (_write("config.json", "{"), "cannot be read as JSON"),
    "configuration that is a list": (_write("config.json", "[]"), "JSON object"),
    "deeply nested configuration": (_write("config.json", "[" * 200_000), "cannot be read as JSON"),
    "configuration of ten gigabytes": (_big_config, "larger than 16 MiB"),
    "index that leaves the folder": (_index("../part.safetensors"), "no safetensors file of this folder"),
    "index with an absolute path": (_index("/etc/passwd"), "no safetensors file of this folder"),
    "index to a pickle": (_index("pytorch_model.bin"), "no safetensors file of this folder"),
    "index to an absent file": (_index("other.safetensors"), "is missing"),
    "index of an absent tensor": (_index("part.safetensors", "model.nothing"), "not in the file"),
    "link out of the folder": (_link_outside, "leaves its folder"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_or_hostile_folder_is_refused_in_one_sentence(copy, case):
    damage, message = HOSTILE[case]
    damage(copy)
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=message) as caught:
        load_target(copy, implementation="lean")
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    assert time.perf_counter() - start < 5


def test_links_into_the_hub_cache_are_followed(copy, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in copy.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    Checkpoint(snapshot)


def test_too_little_memory_is_said_before_anything_is_allocated(model, monkeypatch):
    monkeypatch.setattr(memory, "meminfo", lambda: 1000)
    with pytest.raises(CapacityError, match="1000|0 MB are available") as caught:
        load_checkpoint(model, torch.float32)
    assert "smaller model or dtype" in str(caught.value)


def test_available_memory_is_known_on_linux():
    free = memory.available_memory()
    assert free is None or free > 1 << 20


def test_the_plain_tokenizer_is_transformers_own(tmp_path: Path) -> None:
    """Same ids, text and vocabulary as AutoTokenizer, special tokens and awkward text included."""
    from transformers import AutoTokenizer

    from outrider.assets import shipped
    from outrider.models.tokenizer import PlainTokenizer, load_tokenizer

    ours, theirs = load_tokenizer(shipped("target")), AutoTokenizer.from_pretrained(shipped("target"))
    assert isinstance(ours, PlainTokenizer)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.eos_token_id == theirs.eos_token_id
    for text in ("def f(x):\n\treturn x\n", " 你好 \U0001f600é\r\n", "", "  ", "</s>a<s>", "x" * 500):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_a_tokenizer_that_keeps_no_words_reads_the_same() -> None:
    from transformers import AutoTokenizer

    from outrider.assets import shipped
    from outrider.models.tokenizer import disable_bpe_cache, load_tokenizer

    texts = ("def f(x):\n\treturn x\n", "def f(x):\n\treturn x\n", " 你好 \U0001f600é\r\n", "x" * 500)
    right = [load_tokenizer(shipped("target")).encode(text) for text in texts]
    for forgetful in (load_tokenizer(shipped("target")), AutoTokenizer.from_pretrained(shipped("target"))):
        disable_bpe_cache(forgetful)
        assert [forgetful.encode(text) for text in texts] == right
    disable_bpe_cache(None)  # an engine may have none
    disable_bpe_cache(object())
