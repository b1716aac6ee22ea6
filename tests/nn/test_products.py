"""Packed matrices of learned drafters against the plain ones: the twin of `outrider.nn.linear`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from outrider.nn.linear import draft_linear, with_fast_linears


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.inner = nn.Linear(48, 32), nn.Sequential(nn.Linear(32, 32))
        self.table = nn.Embedding(7, 48)

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        return self.inner(self.fc(self.table(token)))


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_the_plain_one_up_to_bfloat16(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    weight, b = torch.randn(96, 64), torch.randn(96) if bias else None
    x, residual = torch.randn(rows, 64), torch.randn(rows, 96)
    plain = nn.functional.linear(x, weight, b)
    size = x.abs() @ weight.abs().T + (0 if b is None else b.abs())  # a sum's rounding is bounded by that of its terms
    run = draft_linear(weight, b)
    assert run(x).dtype is torch.float32
    assert ((run(x) - plain).abs() <= 3 * 2.0**-8 * size).all()
    assert ((run.add(x, residual) - plain - residual).abs() <= 3 * 2.0**-8 * size + 1e-5).all()


def test_in_double_precision_it_is_the_plain_one() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(9, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(draft_linear(weight)(x), nn.functional.linear(x, weight))


def test_a_served_model_shares_all_but_its_own_linear_layers_and_changes_nothing() -> None:
    torch.manual_seed(1)
    net, token = Net().requires_grad_(False), torch.tensor([[1, 2, 3], [4, 5, 6]])
    before = net(token)
    other = with_fast_linears(net)
    assert torch.equal(net(token), before) and isinstance(net.fc, nn.Linear)
    assert other.inner is net.inner and other.table is net.table and other.fc is not net.fc
    assert other(token).shape == before.shape
    torch.testing.assert_close(other(token), before, rtol=0.02, atol=0.05)
    with pytest.raises(AssertionError):  # a control: the comparison sees another weight
        torch.testing.assert_close(with_fast_linears(Net().requires_grad_(False))(token), before, rtol=0.02, atol=0.05)
