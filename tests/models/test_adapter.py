"""LoRA folders: the merged model is W + scale * B A, and what is no such sum is refused by its name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider import Engine
from outrider.errors import ConfigError
from outrider.models.checkpoint import Checkpoint
from outrider.models.convert import convert
from outrider.models.gguf.checkpoint import GgufCheckpoint
from outrider.models.gguf.names import gguf_name
from outrider.models.load import find_tokenizer, inspect_checkpoint, load_target, load_tokenizer, stop_ids
from outrider.params import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.gguf_files import make_pair

R, PLACES = 3, ("self_attn.q_proj", "mlp.down_proj")


def make_adapter(folder: Path, base: Path, name: str | None = None, **changes: Any) -> Path:
    """An adapter on two linears of each of a base model's layers, with random matrices."""
    noise, tensors = torch.Generator().manual_seed(3), {}
    for module, weight in weights(base).items():
        n, k = weight.shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(R, k, generator=noise)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(n, R, generator=noise) / 10
    folder.mkdir()
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
    named = {"base_model_name_or_path": str(base) if name is None else name}
    (folder / "adapter_config.json").write_text(json.dumps(config | named | changes))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def weights(base: Path) -> dict[str, torch.Tensor]:
    found = load_file(base / "model.safetensors")
    return {name.removesuffix(".weight"): w for name, w in found.items() if any(f"{p}.weight" in name for p in PLACES)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "model", num_hidden_layers=2, tokenizer=True)


SCALES = {
    "alpha over r": ({}, lambda module: 6 / R),
    "rank-stabilised": ({"use_rslora": True}, lambda module: 6 / math.sqrt(R)),
    "one of its own": ({"alpha_pattern": {"down_proj": 12}}, lambda module: (12 if "down" in module else 6) / R),
    "a module by its path": (
        {"alpha_pattern": {"layers.1.self_attn.q_proj": 3}}, lambda module: (3 if "1.self_attn" in module else 6) / R),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALES)
def test_merged_weights_are_the_sum(name: str, base: Path, tmp_path: Path) -> None:
    changes, scale = SCALES[name]
    folder = make_adapter(tmp_path / "adapter", base, **changes)
    merged, plain = Checkpoint(folder), Checkpoint(base)
    tensors, changed = load_file(folder / "adapter_model.safetensors"), 0
    for weight in plain.shapes:
        module = weight.removesuffix(".weight")
        expected = plain.tensor(weight)
        if f"base_model.model.{module}.lora_A.weight" in tensors:
            a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
            expected, changed = expected + scale(module) * (b @ a), changed + 1
        assert torch.equal(merged.tensor(weight), expected), weight
    assert changed == 4


def test_an_adapter_is_a_target(base: Path, tmp_path: Path) -> None:
    """With its base's tokenizer, configuration and ends of text; and named in notices."""
    folder = make_adapter(tmp_path / "adapter", base)
    target = load_target(folder)
    assert any("merged into its base model" in notice for notice in target.notices)
    tokenizer, theirs = find_tokenizer(folder), find_tokenizer(base)
    assert tokenizer is not None and theirs is not None and tokenizer.get_vocab() == theirs.get_vocab()
    assert stop_ids(folder, tokenizer) == stop_ids(base, theirs)
    assert inspect_checkpoint(folder).parameters == inspect_checkpoint(base).parameters
    params = SamplingParams(temperature=0, max_tokens=12)
    texts = [
        Engine.build(target=str(p), draft="none", slots=1, max_length=64).generate("abc", params)[0].text
        for p in (folder, base)
    ]
    assert texts[0] != texts[1]
    drafted = Engine.build(target=str(folder), draft=str(base), slots=1, max_length=64).generate("abc", params)[0].text
    assert drafted == texts[0]


def test_an_adapter_is_converted_as_it_is_merged(tmp_path: Path) -> None:
    """The file has the merged weights, and the base's configuration and tokenizer."""
    pytest.importorskip("gguf")
    base, _ = make_pair(tmp_path, tokenizer=True, num_hidden_layers=2)
    folder = make_adapter(tmp_path / "adapter", base)
    convert(folder, tmp_path / "merged.gguf", "f32")
    found, expected = GgufCheckpoint(tmp_path / "merged.gguf"), Checkpoint(folder)
    down = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(found.weights.numbers(gguf_name(down)), expected.tensor(down))
    ours, theirs = load_tokenizer(tmp_path / "merged.gguf"), load_tokenizer(base)
    assert ours.get_vocab() == theirs.get_vocab() and ours.encode("abc") == theirs.encode("abc")


def test_a_base_beside_it_is_found(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").parent.mkdir(exist_ok=True)
    (tmp_path / "base").symlink_to(base, target_is_directory=True)
    folder = make_adapter(tmp_path / "adapter", base, name="../base")
    assert Checkpoint(folder).config.layers == 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "another kind": ({"peft_type": "LOHA"}, "LOHA"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "biases": ({"bias": "all"}, "bias"),
    "turned weights": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "pissa"),
    "layers repeated": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "a key of tomorrow": ({"use_quantum": True}, "use_quantum"),
    "a wild pattern": ({"alpha_pattern": {"(a+)+$": 3}}, "without wildcards"),
    "no scale": ({"lora_alpha": 0}, "above 0"),
    "a scale without end": ({"lora_alpha": 1e300}, "at most"),
    "no base": ({"base_model_name_or_path": None}, "names no base model"),
    "a base that is not there": ({"base_model_name_or_path": "./nowhere"}, "there is no folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sum_is_refused(name: str, base: Path, tmp_path: Path) -> None:
    changes, said = REFUSED[name]
    folder = make_adapter(tmp_path / "adapter", base, **changes)
    for look in (load_target, inspect_checkpoint):
        with pytest.raises(ConfigError, match=said):
            look(folder)


TENSORS: dict[str, Any] = {
    "one side": lambda t: {name: x for name, x in t.items() if "1.mlp.down_proj.lora_B" not in name},
    "no tensors": lambda t: {},
    "an embedding": lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(3, 4)},
    "another model's": lambda t: {name.replace("layers.1", "layers.7"): x for name, x in t.items()},
    "another width": lambda t: {name: torch.cat([x, x], 1) if "lora_A" in name else x for name, x in t.items()},
    "another rank": lambda t: {name: torch.cat([x, x], 0) if "lora_A" in name else x for name, x in t.items()},
    "a vector": lambda t: {name: x[0].clone() if "lora_A" in name else x for name, x in t.items()},
    "not numbers": lambda t: {name: x * torch.nan for name, x in t.items()},
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_refused(name: str, base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", base)
    file = folder / "adapter_model.safetensors"
    save_file(TENSORS[name](load_file(file)), file)
    with pytest.raises(ConfigError):
        load_target(folder)


def test_an_adapter_without_weights_and_under_transformers(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", base)
    with pytest.raises(ConfigError, match="leave implementation 'hf' out"):
        load_target(folder, implementation="hf")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match="can run code"):
        load_target(folder)
