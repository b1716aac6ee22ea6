"""Packed linear layers against the plain ones."""

from __future__ import annotations

import pytest
import torch

from outrider.nn.linear import PackedLinear, PlainLinear, can_pack, filled, make_linear

SHAPES = [(700, 384), (513, 777), (2048, 256)]


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    noise = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=noise) / shape[-1] ** 0.5).to(dtype)


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_packed_equals_plain(shape, bias, dtype, tolerance):
    """Relative to the norm: one rounding of float32 sums in another order; bfloat16 rounds each output to 8 bits."""
    weight, b = drawn(*shape, dtype=dtype), drawn(shape[0], dtype=dtype) if bias else None
    if not can_pack(weight):
        pytest.skip(f"no packed {dtype} product on this processor")
    packed, plain = make_linear(weight, b), make_linear(weight, b, pack=False)
    assert isinstance(packed, PackedLinear)
    assert isinstance(plain, PlainLinear)
    assert plain.weight is weight
    for rows in (1, 2, 3, 8, 33):
        x, residual = drawn(rows, shape[1], dtype=dtype), drawn(rows, shape[0], dtype=dtype)
        assert error(packed(x), plain(x)) < tolerance
        before = residual.clone()
        assert error(packed.add(x, residual), plain.add(x, residual)) < tolerance
        assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_many_row_counts_have_few_sizes(dtype):
    """Every size that oneDNN meets costs memory for good. What is filled up changes no row."""
    weight = drawn(700, 384, dtype=dtype)
    if not can_pack(weight):
        pytest.skip(f"no packed {dtype} product on this processor")
    for layer in (PackedLinear(weight), *([PlainLinear(weight)] if dtype is torch.bfloat16 else [])):
        sizes = {filled(torch.zeros(n, 8)).shape[0] for n in range(1, 257)}
        assert len(sizes) == 34 and max(sizes) == 256
        x, residual = drawn(256, 384, dtype=dtype), drawn(256, 700, dtype=dtype)
        for n in (17, 24, 63, 65, 200):
            assert layer(x[:n]).shape == layer.add(x[:n], residual[:n]).shape == (n, 700)
            assert error(layer(x[:n]), layer(x)[:n]) < (1e-6 if dtype is torch.float32 else 1e-2)
            assert error(layer.add(x[:n], residual[:n]), layer(x)[:n] + residual[:n]) < (
                1e-6 if dtype is torch.float32 else 1e-2
            )


def test_what_cannot_be_packed_stays_plain():
    assert isinstance(make_linear(drawn(700, 384).double()), PlainLinear)
    assert isinstance(make_linear(drawn(8, 8)), PlainLinear)
