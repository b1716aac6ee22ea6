"""Folders of learned drafters: every key of their configuration is read, without effect, or refused by name; so is every tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.drafters.dflash.format import DFlashConfig
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.drafters.eagle.eagle1 import Eagle1Network
from outrider.drafters.eagle.eagle3 import Eagle3Network
from outrider.drafters.eagle.network import EagleConfig
from outrider.drafters.medusa.format import MedusaConfig, SequentialConfig
from outrider.drafters.medusa.network import MedusaNetwork
from outrider.drafters.medusa.sequential import SequentialNetwork
from outrider.drafters.mtp.network import MtpConfig, MtpNetwork
from outrider.drafters.registry import load_drafter
from outrider.errors import ConfigError
from outrider.models.toy import TinyLM

WIDTH, VOCAB, LAYERS = 16, 32, 6
TARGET = TinyLM(VOCAB, WIDTH, LAYERS)
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "heads": 2, "kv_heads": 2, "head_dim": 8, "inner": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = ("eagle3", "eagle1", "mtp", "dflash", "medusa", "hydra")


def make(kind: str, folder: Path) -> Path:
    """A drafter of this kind, saved as its trainer saves it."""
    if kind == "eagle3":
        Eagle3Network(EagleConfig(hidden=WIDTH, target_hidden=WIDTH, taps=(1, 2, 3), **SIZES)).save(folder)
    elif kind == "eagle1":
        Eagle1Network(EagleConfig(hidden=WIDTH, target_hidden=WIDTH, taps=(LAYERS,), **SIZES)).save(folder)
    elif kind == "mtp":
        MtpNetwork(MtpConfig(hidden=WIDTH, target_hidden=WIDTH, taps=(LAYERS,), **SIZES)).save(folder)
    elif kind == "dflash":
        DFlashNetwork(DFlashConfig(hidden=WIDTH, taps=(1, 2), block=4, mask=0, **SIZES)).save(folder, tables=True)
    elif kind == "hydra":
        SequentialNetwork(SequentialConfig(WIDTH, VOCAB, (1, LAYERS), 16, 32)).save(folder)
    else:
        MedusaNetwork(MedusaConfig(hidden=WIDTH, vocab_size=VOCAB, heads=2, tap=LAYERS)).save(folder)
    return folder


def load(kind: str, folder: Path) -> Any:
    loaders = {
        "eagle3": Eagle3Network,
        "eagle1": Eagle1Network,
        "mtp": MtpNetwork,
        "dflash": DFlashNetwork,
        "medusa": MedusaNetwork,
        "hydra": SequentialNetwork,
    }
    return loaders[kind].load(folder, TARGET)


def edit(folder: Path, part: str, changes: dict[str, Any]) -> None:
    """Change keys at the top ("") or in a nested part of config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config[part] if part else config).update(changes)
    path.write_text(json.dumps(config))


def place(kind: str) -> str:
    return "transformer_layer_config" if kind in ("eagle3", "dflash") else ""


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_trainers_write_is_read(kind: str, tmp_path: Path) -> None:
    load(kind, make(kind, tmp_path))


@pytest.mark.parametrize("kind", ["eagle3", "eagle1", "mtp", "dflash"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", LLAMA3), ("rope_scaling", {"type": "dynamic", "factor": 4.0}), ("hidden_act", "gelu"),
        ("rope_parameters", LLAMA3 | {"rope_theta": 5e5}), ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.25}), ("rope_parameters", {"scaled": 1}),
        ("mlp_bias", True), ("attention_bias", True), ("sliding_window", 5), ("use_sliding_window", True),
        ("layer_types", ["sliding_attention"]), ("partial_rotary_factor", 0.5), ("norm_output", True), ("qk_norm", True),
        ("attn_logit_softcapping", 30.0), ("logit_scale", 0.5), ("is_causal", False), ("rms_norm_eps", "1e-6"),
        ("rope_theta", "big"),
    ],
)  # fmt: skip
def test_parts_of_a_layer_that_are_not_computed_are_refused_by_name(kind, key, value, tmp_path) -> None:
    folder = make(kind, tmp_path)
    if kind not in ("eagle1", "mtp") and key in (
        "sliding_window",
        "rope_theta",
    ):  # where another key says that they mean nothing
        edit(folder, place(kind), {"layer_types": None, "use_sliding_window": None, "rope_parameters": None})
    edit(folder, place(kind), {key: value})
    with pytest.raises(ConfigError) as refusal:
        load(kind, folder)
    assert any(word in str(refusal.value) for word in (key, "rotary positions", "partial_rotary_factor"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization", "residual_scale"])
def test_unknown_keys_and_quantized_weights_are_refused_by_name(kind: str, key: str, tmp_path: Path) -> None:
    edit(make(kind, tmp_path), "", {key: {"quant_method": "compressed-tensors"}})
    with pytest.raises(ConfigError, match=key):
        load(kind, tmp_path)


@pytest.mark.parametrize(("kind", "model_type"), [("eagle3", "qwen3"), ("eagle3", "deepseek_v3"), ("dflash", "llama")])
def test_layers_of_another_family_are_refused(kind: str, model_type: str, tmp_path: Path) -> None:
    edit(make(kind, tmp_path), place(kind), {"model_type": model_type})
    with pytest.raises(ConfigError, match=model_type):
        load(kind, tmp_path)


@pytest.mark.parametrize("key", ["norm_output", "norm_before_fc", "fc_norm"])
def test_norms_of_other_releases_are_refused(key: str, tmp_path: Path) -> None:
    edit(make("eagle3", tmp_path), "", {key: True})
    with pytest.raises(ConfigError, match=key):
        load("eagle3", tmp_path)


def test_layers_to_read_may_stand_in_eagle_config(tmp_path: Path) -> None:
    folder = make("eagle3", tmp_path)
    nested = {"eagle_aux_hidden_state_layer_ids": [2, 3, 5], "use_aux_hidden_state": True}
    edit(folder, "", {"eagle_aux_hidden_state_layer_ids": None, "eagle_config": nested})
    assert load("eagle3", folder).config.taps == (2, 3, 5)
    edit(folder, "", {"eagle_config": {"use_aux_hidden_state": False}})
    with pytest.raises(ConfigError, match="use_aux_hidden_state"):
        load("eagle3", folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["extra", "absent", "codes", "shape"])
def test_tensors_that_do_not_fit_are_refused_by_name(kind: str, fault: str, tmp_path: Path) -> None:
    file = make(kind, tmp_path) / "model.safetensors"
    tensors = load_file(file)
    name = next(
        n for n, t in sorted(tensors.items()) if t.ndim == 2 and n not in ("embed_tokens.weight", "lm_head.weight")
    )
    if fault == "extra":
        tensors["layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)
        name = "weight_scale"
    elif fault == "absent":
        del tensors[name]
    else:
        tensors[name] = tensors[name].to(torch.int8) if fault == "codes" else torch.zeros(3, 5)
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=name):
        load(kind, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_read_and_pickles_are_not(kind: str, tmp_path: Path) -> None:
    one = load(kind, make(kind, tmp_path)).state_dict()
    file = tmp_path / "model.safetensors"
    tensors = sorted(load_file(file).items())
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled"):
        load(kind, tmp_path)
    placed = {}
    for i, part in enumerate((tensors[:2], tensors[2:])):
        save_file(dict(part), tmp_path / f"part-{i}.safetensors")
        placed |= dict.fromkeys(dict(part), f"part-{i}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    two = load(kind, tmp_path).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    index.write_text(json.dumps({"weight_map": {"a": "../part-0.safetensors"}}))
    with pytest.raises(ConfigError, match="not a safetensors file of this folder"):
        load(kind, tmp_path)


def test_learned_drafters_are_asked_of_whoever_finds_folders(tmp_path: Path) -> None:
    folder, asked = make("medusa", tmp_path), []

    def find(name: str) -> Path:
        asked.append(name)
        return folder

    load_drafter("medusa:some-org/some-medusa", target=TARGET, length=2, find_folder=find)
    assert asked == ["some-org/some-medusa"]
