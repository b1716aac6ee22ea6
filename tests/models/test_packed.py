"""Quantised checkpoints in safetensors: unpacked weights are what each format's own formula says, number by number.

Every format is written here word by word, by loops over its definition, and read by the checkpoint reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.errors import ConfigError
from outrider.models.checkpoint import Checkpoint
from outrider.models.config import Unsupported
from outrider.models.entries import Entry
from outrider.models.load import inspect_checkpoint, load_target
from outrider.models.packed import packing_of
from tests.checkpoints import edit_config, make_checkpoint

G = 16
Random = np.random.Generator
Pack = Callable[[int, int, Random], tuple[dict[str, torch.Tensor], np.ndarray]]
"""(N, K, random numbers) -> the tensors of a packed weight by their ends, and its values."""


def words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Rows of codes as rows of 32-bit words, the first code in the lowest bits."""
    each = 32 // bits
    out = np.zeros((codes.shape[0], -(-codes.shape[1] // each)), np.uint64)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            out[i, j // each] |= np.uint64(codes[i, j]) << np.uint64(bits * (j % each))
    return torch.from_numpy(out.astype(np.uint32).view(np.int32))


def scales(random: Random, *shape: int) -> np.ndarray:
    return random.uniform(0.01, 0.02, shape).astype(np.float16).astype(np.float32)


def half(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).half()


def gptq(bits: int, version: int, ordered: bool) -> Pack:
    def pack(n: int, k: int, random: Random) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        q, z, s = (
            random.integers(0, 1 << bits, (n, k)),
            random.integers(1, 1 << bits, (n, k // G)),
            scales(random, n, k // G),
        )
        index = np.arange(k) // G if ordered else random.permutation(np.arange(k) // G)
        value = np.array(
            [[s[i, index[j]] * (q[i, j] - z[i, index[j]]) for j in range(k)] for i in range(n)], np.float32
        )
        tensors = {
            "qweight": words(q, bits).t().contiguous(),
            "qzeros": words((z - (version == 1)).T, bits),
            "scales": half(s.T),
        }
        return tensors | {"g_idx": torch.from_numpy(index.astype(np.int32))}, value

    return pack


def awq(n: int, k: int, random: Random) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    q, z, s = random.integers(0, 16, (n, k)), random.integers(0, 16, (n, k // G)), scales(random, n, k // G)
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def columns(codes: np.ndarray) -> torch.Tensor:
        shuffled = np.stack([codes[:, 8 * (j // 8) + order[j % 8]] for j in range(codes.shape[1])], 1)
        return words(shuffled, 4)

    value = np.array([[s[i, j // G] * (q[i, j] - z[i, j // G]) for j in range(k)] for i in range(n)], np.float32)
    return {"qweight": columns(q.T), "qzeros": columns(z.T), "scales": half(s.T)}, value


def packed_fours(symmetric: bool) -> Pack:
    def pack(n: int, k: int, random: Random) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        q, s = random.integers(0, 16, (n, k)), scales(random, n, k // G)
        z = np.full((n, k // G), 8) if symmetric else random.integers(0, 16, (n, k // G))
        value = np.array([[s[i, j // G] * (q[i, j] - z[i, j // G]) for j in range(k)] for i in range(n)], np.float32)
        out = {"weight_packed": words(q, 4), "weight_scale": half(s), "weight_shape": torch.tensor([n, k])}
        return out if symmetric else out | {"weight_zero_point": words(z.T, 4).t().contiguous()}, value

    return pack


def int8(n: int, k: int, random: Random) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    q, s = random.integers(-128, 128, (n, k)).astype(np.int8), scales(random, n, 1)
    return {"weight": torch.from_numpy(q), "weight_scale": torch.from_numpy(s)}, q.astype(np.float32) * s


def eights(n: int, k: int, random: Random) -> torch.Tensor:
    return torch.from_numpy(random.normal(0, 1, (n, k)).astype(np.float32)).to(torch.float8_e4m3fn)


def float8(n: int, k: int, random: Random) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    w, s = eights(n, k, random), scales(random, n, 1)
    return {"weight": w, "weight_scale": torch.from_numpy(s)}, w.float().numpy() * s


def fp8(n: int, k: int, random: Random) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    w, s = eights(n, k, random), scales(random, -(-n // 16), -(-k // 32))
    value = np.array([[w[i, j].float().item() * s[i // 16, j // 32] for j in range(k)] for i in range(n)], np.float32)
    return {"weight": w, "weight_scale_inv": torch.from_numpy(s)}, value


def mlx(bits: int) -> Pack:
    def pack(n: int, k: int, random: Random) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        q, s, b = random.integers(0, 1 << bits, (n, k)), scales(random, n, k // G), scales(random, n, k // G)
        value = np.array(
            [[np.float32(s[i, j // G] * q[i, j]) + b[i, j // G] for j in range(k)] for i in range(n)], np.float32
        )
        return {"weight": words(q, bits).view(torch.uint32), "scales": half(s), "biases": half(b)}, value

    return pack


def group(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


CASES: dict[str, tuple[Pack, dict[str, Any]]] = {
    "gptq 4": (gptq(4, 1, True), {"quant_method": "gptq", "bits": 4, "group_size": G}),
    "gptq 4, act-order": (gptq(4, 1, False), {"quant_method": "gptq", "bits": 4, "group_size": G, "desc_act": True}),
    "gptq 8, v2": (gptq(8, 2, True), {"quant_method": "gptq", "bits": 8, "group_size": G, "checkpoint_format": "gptq_v2"}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": G, "version": "gemm", "zero_point": True}),
    "int8": (int8, group(num_bits=8, type="int", strategy="channel", symmetric=True) | {"format": "int-quantized"}),
    "float8": (float8, group(num_bits=8, type="float", strategy="channel", symmetric=True) | {"format": "float-quantized"}),
    "fours": (
        packed_fours(True),
        group(num_bits=4, type="int", strategy="group", group_size=G, symmetric=True) | {"format": "pack-quantized"}),
    "fours with zeros": (
        packed_fours(False),
        group(num_bits=4, type="int", strategy="group", group_size=G, symmetric=False) | {"format": "pack-quantized"}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [16, 32]}),
    "mlx 4": (mlx(4), {"bits": 4, "group_size": G}),
    "mlx 8": (mlx(8), {"bits": 8, "group_size": G}),
}  # fmt: skip


def make_packed(folder: Path, case: str) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint whose linears are packed (MLX: embedding and head too), and the values of the packed weights by name."""
    pack, how = CASES[case]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 40}
    make_checkpoint(folder, **sizes)
    edit_config(folder, **({"quantization": how} if case.startswith("mlx") else {"quantization_config": how}))
    tensors, random, values = load_file(folder / "model.safetensors"), np.random.default_rng(7), {}
    for name in list(tensors):
        if tensors[name].ndim < 2 or not (case.startswith("mlx") or "_proj" in name):
            continue
        packed, values[name] = pack(*tensors[name].shape, random)
        del tensors[name]
        tensors |= {name.removesuffix("weight") + end: tensor for end, tensor in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, values


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_format(case: str, tmp_path: Path) -> None:
    folder, values = make_packed(tmp_path, case)
    checkpoint = Checkpoint(folder)
    assert len(values) >= 7
    for name, value in values.items():
        assert torch.equal(checkpoint.tensor(name), torch.from_numpy(value)), name
    target = load_target(folder, dtype="float32")
    assert target.vocab_size == 40 and any("unpacked from" in notice for notice in target.notices)
    facts = inspect_checkpoint(folder)
    assert facts.runtime == "lean" and facts.parameters == checkpoint.parameters


DAMAGES = {
    "a tensor away": lambda t: {k: v for k, v in t.items() if not k.endswith("0.mlp.up_proj.scales")},
    "codes cut": lambda t: t | {"model.layers.0.mlp.up_proj.qweight": t["model.layers.0.mlp.up_proj.qweight"][:-1].clone()},
    "scales cut": lambda t: t | {"model.layers.0.mlp.up_proj.scales": t["model.layers.0.mlp.up_proj.scales"][:-1].clone()},
    "zeros turned": lambda t: t | {"model.layers.0.mlp.up_proj.qzeros": t["model.layers.0.mlp.up_proj.qzeros"].t().contiguous()},
    "a scale of nothing": lambda t: t | {"model.layers.0.mlp.up_proj.scales": t["model.layers.0.mlp.up_proj.scales"] * torch.nan},
    "a scale without end": lambda t: t | {"model.layers.0.mlp.up_proj.scales": t["model.layers.0.mlp.up_proj.scales"] * torch.inf},
    "a group that is not": lambda t: t | {"model.layers.0.mlp.up_proj.g_idx": t["model.layers.0.mlp.up_proj.g_idx"] + 1},
    "a group below": lambda t: t | {"model.layers.0.mlp.up_proj.g_idx": t["model.layers.0.mlp.up_proj.g_idx"] - 1},
    "index cut": lambda t: t | {"model.layers.0.mlp.up_proj.g_idx": t["model.layers.0.mlp.up_proj.g_idx"][:-1].clone()},
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints(name: str, tmp_path: Path) -> None:
    folder, _ = make_packed(tmp_path, "gptq 4")
    tensors = load_file(folder / "model.safetensors")
    save_file(DAMAGES[name](tensors), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="damaged"):
        load_target(folder)


@pytest.mark.parametrize("case", CASES)
def test_parts_of_another_type_are_refused(case: str, tmp_path: Path) -> None:
    """Codes among them: a scale that is an integer, or a word that is a number, would be taken for what it is not."""
    folder, values = make_packed(tmp_path, case)
    tensors, base = load_file(folder / "model.safetensors"), next(iter(values)).removesuffix("weight")
    parts = [name for name in tensors if name.startswith(base) and not name.endswith("shape")]
    assert len(parts) >= 2
    for name in parts:
        other = torch.int16 if tensors[name].is_floating_point() else torch.float32
        changed = tensors | {name: tensors[name].to(other)}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((ConfigError, Unsupported)) as refused:
            Checkpoint(folder)
        assert "\n" not in str(refused.value)


ODD = {
    "gptq 4": (36, 32, {"qweight": (4, 36), "qzeros": (2, 4), "scales": (2, 36), "g_idx": (32,)}),
    "awq": (36, 32, {"qweight": (32, 4), "qzeros": (2, 4), "scales": (2, 36)}),
    "fours": (32, 40, {"weight_packed": (32, 5), "weight_scale": (32, 2)}),
    "mlx 4": (32, 40, {"weight": (32, 5), "scales": (32, 2), "biases": (32, 2)}),
}
"""N, K, and the shapes of tensors that have as many whole words and groups as fit into them."""


@pytest.mark.parametrize("case", ODD)
def test_sizes_that_are_no_whole_words_are_refused(case: str) -> None:
    n, k, shapes = ODD[case]
    how = CASES[case][1]
    packing = packing_of({"quantization" if case.startswith("mlx") else "quantization_config": how})
    assert packing is not None
    entries = {f"x.{end}": Entry(Path(), packing.kinds[end][0], shape) for end, shape in shapes.items()}
    with pytest.raises(ConfigError, match="cannot have whole words and groups"):
        packing.tensors("x.weight", (n, k), entries)


CHANGES: dict[str, dict[str, Any]] = {
    "3 bits": {"bits": 3},
    "groups that are not whole": {"group_size": 7},
    "groups of text": {"group_size": "16"},
    "no groups": {"group_size": 0},
    "marlin": {"is_marlin_format": True},
    "another layout": {"checkpoint_format": "marlin"},
    "another method": {"quant_method": "quux"},
    "no bits": {"bits": None},
}


@pytest.mark.parametrize("name", CHANGES)
def test_configurations_that_contradict_the_files(name: str, tmp_path: Path) -> None:
    folder, _ = make_packed(tmp_path, "gptq 4")
    how = json.loads((folder / "config.json").read_text())["quantization_config"] | CHANGES[name]
    edit_config(folder, quantization_config=how)
    with pytest.raises(ConfigError):
        load_target(folder)


def test_groups_of_nothing_are_refused(tmp_path: Path) -> None:
    """Groups that are not whole, and scales and zeros of no group at all beside them."""
    folder, _ = make_packed(tmp_path, "gptq 4")
    how = json.loads((folder / "config.json").read_text())["quantization_config"] | {"group_size": 7}
    edit_config(folder, quantization_config=how)
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if not name.endswith("g_idx")}
    empty = {name: t[:0].clone() for name, t in tensors.items() if name.endswith(("scales", "qzeros"))}
    save_file(tensors | empty, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="damaged"):
        load_target(folder)
