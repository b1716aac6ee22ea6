"""gpt-oss as it is published: experts in MXFP4, in folders and in the files that are made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from outrider.errors import ConfigError
from outrider.models.checkpoint import Checkpoint
from outrider.models.convert import convert
from outrider.models.gguf.checkpoint import GgufCheckpoint
from outrider.models.gguf.weights import Weights
from outrider.models.load import inspect_checkpoint, load_target
from outrider.models.rotary import plain_frequencies
from outrider.types import Draft, Rows
from tests.checkpoints import edit_config, make_checkpoint, make_model
from tests.mixture_files import small, write

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


class Largest(TorchDispatchMode):
    """The greatest number of values that a tensor made meanwhile holds in a type wider than the weights'."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, list | tuple) else [out]:
            if isinstance(made, torch.Tensor) and made.dtype in (torch.float32, torch.int32, torch.int64):
                self.values = max(self.values, made.untyped_storage().nbytes() // made.itemsize)
        return out


def test_codes_are_unpacked_an_expert_at_a_time(made: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """Of 5 experts of [64, 64] and [32, 64] nothing wider than the weights holds more than the largest."""
    checkpoint, whole = Checkpoint(made[0]), "model.layers.0.mlp.experts.gate_up_proj"
    with Largest() as seen:
        checkpoint.tensor(whole)
    assert seen.values == 5 * 64 * 64  # the control: a tensor of all of them is seen
    with Largest() as seen:
        checkpoint.read(torch.bfloat16)
    assert max(64 * 64, 64 * checkpoint.config.vocab_size) == seen.values
    with Largest() as seen:
        assert [part.shape for part in checkpoint.parts(whole)] == [(64, 64)] * 5
    assert seen.values == 64 * 64


def test_layers_have_the_numbers_of_their_file_in_their_places(made: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """Of gates and ups that take turns in [inputs, outputs], the gates of all experts, then the ups, in [outputs, inputs]."""
    layer = Checkpoint(made[0]).read(torch.float32).layers[1]  # type: ignore[index]
    both, down = (made[1][f"model.layers.1.mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
    assert torch.equal(layer.gate_up, torch.cat([*both[:, :, ::2].mT, *both[:, :, 1::2].mT]))
    assert torch.equal(layer.down, torch.cat([*down.mT]))
    stored = load_file(made[0] / "model.safetensors")
    bias = stored["model.layers.1.mlp.experts.gate_up_proj_bias"]
    assert torch.equal(layer.gate_up_bias, torch.cat([*bias[:, ::2], *bias[:, 1::2]]))
    assert torch.equal(layer.down_bias, stored["model.layers.1.mlp.experts.down_proj_bias"].flatten())


ODD = {
    "inputs that are no whole blocks": (
        {"intermediate_size": 48},
        "down_proj_blocks cannot have whole words and groups",
    ),
    "hidden sizes that are none": ({"hidden_size": 80, "head_dim": 20}, "gate_up_proj_blocks cannot have whole words"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_sizes_are_refused(name: str, tmp_path: Path) -> None:
    sizes, words = ODD[name]
    folder = make_checkpoint(tmp_path, "gpt_oss", **(SIZES | sizes))
    packed(folder)
    with pytest.raises(ConfigError, match=words) as refused:
        load_target(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", [torch.float32, torch.int8])
def test_scales_of_another_type_are_refused(kind: torch.dtype, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt_oss", **SIZES)
    packed(folder)
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.experts.down_proj_scales"
    save_file(tensors | {name: tensors[name].to(kind)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="down_proj_scales is stored as .* and not as U8"):
        load_target(folder)


def test_a_file_without_scaled_positions_and_one_without_its_window(tmp_path: Path) -> None:
    """The first has plain frequencies, the second says nothing of its layers: llama.cpp reads and refuses them likewise."""
    pytest.importorskip("gguf")
    model = small("gpt_oss", swiglu_limit=7.0, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    scaling = {f"rope.scaling.{key}": None for key in ("type", "factor", "original_context_length")}
    rope = {"factor": 0, "original_max_position_embeddings": 0}  # which `write` reads, and leaves out
    model.config.rope_parameters |= rope
    checkpoint = GgufCheckpoint(write(model, tmp_path / "plain.gguf", {"": "Q8_0"}, **scaling))
    assert torch.allclose(checkpoint.config.inv_freq, plain_frequencies(500.0, checkpoint.config.head_dim))
    assert checkpoint.config.rope_scale == 1.0 and max(checkpoint.config.window) == 5
    file = write(model, tmp_path / "none.gguf", {"": "Q8_0"}, **scaling, **{"attention.sliding_window": None})
    with pytest.raises(ConfigError, match=r"lacks gpt-oss\.attention\.sliding_window"):
        GgufCheckpoint(file)


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
