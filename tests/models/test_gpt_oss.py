"""gpt-oss as it is published: experts in MXFP4, in folders and in the files that are made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from outrider.errors import ConfigError
from outrider.models.checkpoint import Checkpoint
from outrider.models.convert import convert
from outrider.models.gguf.checkpoint import GgufCheckpoint
from outrider.models.gguf.weights import Weights
from outrider.models.load import inspect_checkpoint, load_target
from outrider.types import Draft, Rows
from tests.checkpoints import edit_config, make_checkpoint, make_model

SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "swiglu_limit": 7.0}
TEXT = [7, 50, 33, 91, 20, 18, 90, 64, 5, 5, 77, 30]


def packed(folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint with experts of random codes; returns what they stand for by transformers' own function."""
    file, noise = folder / "model.safetensors", torch.Generator().manual_seed(4)
    tensors, values = load_file(file), {}
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj")) and "experts" in n]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), generator=noise, dtype=torch.uint8)
        scales = torch.randint(122, 126, (experts, outputs, inputs // 32), generator=noise, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, file)
    edit_config(
        folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    )
    return values


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = make_checkpoint(tmp_path_factory.mktemp("oss") / "source", "gpt_oss", **SIZES)
    return folder, packed(folder)


def test_codes_stand_for_what_transformers_says(made: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, values = made
    checkpoint = Checkpoint(folder)
    for name, value in values.items():
        assert torch.equal(checkpoint.tensor(name), value), name
    model = make_model("gpt_oss", **SIZES)
    for name, parameter in model.named_parameters():
        parameter.copy_(values.get(name, parameter))
    target = load_target(folder, dtype="float32")
    rows = Rows.assemble([0], [TEXT], [0], Draft.empty(1))
    with torch.no_grad():
        expected = model(torch.tensor([TEXT])).logits[0, -1]
    assert torch.allclose(target.forward(rows, target.new_kv(1, 16)).logits[0], expected, atol=2e-4)
    assert any("unpacked from MXFP4" in notice for notice in target.notices)
    facts = inspect_checkpoint(folder)
    assert facts.runtime == "lean" and facts.experts.startswith("3 of 5 a row")


def test_a_file_keeps_the_numbers_exactly(made: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    convert(made[0], tmp_path / "x.gguf", "mxfp4")
    kinds = {name: tensor.block.name for name, tensor in Weights(tmp_path / "x.gguf").tensors.items()}
    assert {kinds[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")} == {"mxfp4"}
    assert kinds["blk.0.attn_q.weight"] == "q8_0" and kinds["blk.0.ffn_gate_inp.weight"] == "f32"
    ours, theirs = GgufCheckpoint(tmp_path / "x.gguf").read(torch.float32), Checkpoint(made[0]).read(torch.float32)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        for part in ("gate_up", "down", "gate_up_bias", "down_bias", "router", "router_bias", "sinks"):
            assert torch.equal(getattr(a, part), getattr(b, part)), part


def test_damaged_codes_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt_oss", **SIZES)
    packed(folder)
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.experts.down_proj"
    tensors[f"{name}_scales"][0, 0, 0] = 255
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="no finite numbers"):
        load_target(folder)
    tensors[f"{name}_scales"] = tensors[f"{name}_scales"][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="down_proj_scales has shape"):
        load_target(folder)
    del tensors[f"{name}_scales"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="down_proj_scales is missing"):
        load_target(folder)
