"""Blocks of GGUF: values and roundings are those of the `gguf` package, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from outrider.errors import ConfigError
from outrider.nn.blocks import BLOCKS, REMOVED, UNREAD, dequantise, named, quantise

quants = pytest.importorskip("gguf.quants")
constants = pytest.importorskip("gguf.constants")
ROUNDS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "bf16", "f16", "f32", "mxfp4")


def random_blocks(number: int, rows: int, blocks: int, seed: int = 0) -> torch.Tensor:
    """Random bytes; the half-precision scales are finite."""
    block, generator = BLOCKS[number], np.random.default_rng(seed)
    out = generator.integers(0, 256, (rows * blocks, block.bytes), dtype=np.uint8)
    for at in block.scales:
        scale = generator.normal(0, 0.01, rows * blocks).astype(np.float16)
        out[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    if block.plain:
        out[:, -1] &= 0x3F  # finite in every type
    return torch.from_numpy(out.reshape(rows, -1).copy())


@pytest.mark.filterwarnings("ignore:overflow encountered")  # random scales of MXFP4 reach beyond float32
@pytest.mark.parametrize("number", [n for n, b in BLOCKS.items() if b.name != "f64"])
def test_values_are_those_of_the_gguf_package(number: int) -> None:
    rows = random_blocks(number, 7, 5, seed=number)
    theirs = quants.dequantize(rows.numpy(), constants.GGMLQuantizationType(number))
    ours = dequantise(rows, BLOCKS[number])
    assert ours.dtype is torch.float32
    assert np.array_equal(ours.numpy().view(np.uint32), np.ascontiguousarray(theirs).view(np.uint32))


def test_every_number_of_ggml_is_read_or_refused_by_name() -> None:
    for kind in constants.GGMLQuantizationType:
        if kind.value in BLOCKS:
            block = BLOCKS[kind.value]
            assert block.name == kind.name.lower()
            assert (block.values, block.bytes) == constants.GGML_QUANT_SIZES[kind]
        else:
            assert UNREAD[kind.value] == kind.name.lower()
    assert not (set(BLOCKS) & set(UNREAD)) | (set(REMOVED) & (set(BLOCKS) | set(UNREAD)))


@pytest.mark.parametrize("name", ROUNDS)
def test_roundings_are_those_of_the_gguf_package(name: str) -> None:
    block = named(name)
    x = np.random.default_rng(3).standard_t(3, (9, 8 * 32)).astype(np.float32)
    x[0], x[1, :32] = 0, 1e-8
    theirs = quants.quantize(x, constants.GGMLQuantizationType(block.number)).view(np.uint8).reshape(9, -1)
    assert np.array_equal(quantise(torch.from_numpy(x), block).numpy(), theirs)


@pytest.mark.parametrize("name", [*ROUNDS[:5], "q4_k", "q5_k", "q6_k"])
def test_rounding_errors_are_those_of_the_format(name: str) -> None:
    block = named(name)
    x = torch.from_numpy(np.random.default_rng(5).normal(0, 1, (4, 512)).astype(np.float32))
    once = dequantise(quantise(x, block), block)
    error = (once - x).square().mean().sqrt()
    bounds = {
        "q8_0": 0.0065,
        "q4_0": 0.1,
        "q4_1": 0.09,
        "q5_0": 0.05,
        "q5_1": 0.045,
        "q4_k": 0.09,
        "q5_k": 0.045,
        "q6_k": 0.025,
    }
    bound = bounds[name]
    assert 0 < error < bound  # a wrong scale or offset is off by far more
    out = torch.empty(4, 512, dtype=torch.bfloat16)
    assert torch.equal(dequantise(quantise(x, block), block, out), once.bfloat16())


@pytest.mark.parametrize("name", ["q4_k", "q5_k", "q6_k"])
def test_numbers_that_the_format_holds_come_back(name: str) -> None:
    """Multiples of a unit in every part: only the scales' half precision is lost."""
    block, generator = named(name), np.random.default_rng(1)
    most = {"q4_k": 15, "q5_k": 31, "q6_k": 31}[name]
    x = torch.from_numpy(generator.integers(0, most + 1, (3, 512)).astype(np.float32))
    x[:, ::16] = most if name != "q6_k" else -32
    x[:, 1::16] = 0
    assert torch.allclose(dequantise(quantise(x, block), block), x, atol=0.01 * most)
    zero = torch.zeros(2, 256)
    assert torch.equal(dequantise(quantise(zero, block), block), zero)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="unknown type 'q8_1'; did you mean"):
        named("q8_1")
    with pytest.raises(ConfigError, match="whole blocks"):
        quantise(torch.zeros(1, 33), named("q4_0"))
    with pytest.raises(ConfigError, match="type to round to"):
        quantise(torch.zeros(1, 256), named("q3_k"))
