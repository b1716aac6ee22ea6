"""Native draws and best entries against their twins: the same tokens, sums and values, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from outrider.drafters.tree import draws
from outrider.nn import picks
from outrider.transfer import fetch

pytestmark = pytest.mark.skipif(picks.best(torch.ones(1, 1), 1) is None, reason="native passes need a C++ compiler")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
SIZES = pytest.mark.parametrize("size", [1, 7, 255, 256, 257, 5000])


def distributions(size: int, dtype: torch.dtype) -> Tensor:
    """Flat, peaked and sparse ones, one without mass, one that is not finite."""
    noise = torch.Generator().manual_seed(size)
    scale = torch.tensor([0.1, 3.0, 12.0, 3.0])[:, None]
    rows = (scale * torch.randn(4, size, generator=noise, dtype=torch.float64)).softmax(-1)
    rows[3, torch.rand(size, generator=noise) < 0.9] = 0.0
    broken = torch.stack([torch.zeros(size, dtype=torch.float64), rows[0]])
    broken[1, size // 2] = torch.nan
    return torch.cat([rows, broken]).to(dtype)


@DTYPES
@SIZES
@pytest.mark.parametrize("replace", [True, False], ids=["independent", "without replacement"])
def test_draws_are_the_twins(size: int, dtype: torch.dtype, replace: bool) -> None:
    q, noise = distributions(size, dtype), torch.Generator().manual_seed(1)
    for width in (1, 3):
        uniform = torch.rand(len(q), width, generator=noise, dtype=torch.float64)
        uniform[0, 0], uniform[1, 0] = 1e-12, 1.0 - 2.0**-53
        found = picks.draws(q, uniform.tolist(), replace=replace)
        twin = draws.independent if replace else draws.successive
        wanted = twin(q, uniform.tolist())
        assert found is not None
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1].nan_to_num(-1.0), wanted[1].nan_to_num(-1.0))
        assert (found[0][4:] == size).all()  # no mass, not finite: no token


@DTYPES
@SIZES
@pytest.mark.parametrize("width", [1, 2, 8])
def test_the_best_are_the_twins(size: int, dtype: torch.dtype, width: int) -> None:
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64).to(dtype)
    x[4, torch.arange(size) % 3 == 0] = -torch.inf
    width = min(width, size)
    found = picks.best(x, width)
    wanted = x.topk(width, -1)
    assert found is not None
    assert torch.equal(found[1], wanted.values)
    assert torch.equal(x.gather(1, found[0]), wanted.values)
    assert all(len(set(row)) == width for row in found[0].tolist())


def test_the_first_of_equal_ones_is_the_best_and_nan_never_is() -> None:
    x = torch.zeros(3, 300)
    x[0, [250, 20]] = 1.0
    x[1] = torch.nan
    x[2, 0], x[2, 299] = torch.nan, 2.0
    token, value = picks.best(x, 3)  # type: ignore[misc]
    assert token[0].tolist() == [20, 250, 0]
    assert value[1].isnan().all()
    assert token[2].tolist() == [299, 1, 2]
    assert fetch(draws.top(x, 3, floor=0.0))[0].tokens == [[20, 250], [], [299]]


def test_a_row_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    q, uniform = distributions(700, torch.float32), [[0.3, 0.9]] * 6
    together = picks.draws(q, uniform, replace=False)
    for i in range(6):
        alone = picks.draws(q[i : i + 1], uniform[:1], replace=False)
        assert together is not None and alone is not None and torch.equal(alone[0][0], together[0][i])
    assert picks.best(q[:, ::2], 2) is None  # rows that are not contiguous are the twin's
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")
    assert picks.draws(q, uniform, replace=True) is None


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1024, 1030, 5000])
def test_distributions_are_softmax_to_rounding_and_know_no_neighbours(size: int) -> None:
    x = torch.randn(6, size, generator=torch.Generator().manual_seed(size)) * 8
    x[1, ::3], x[2], x[3, size // 2] = -torch.inf, x[2] - 300.0, 500.0
    temperature = [1.0, 0.7, 1.0, 1.0, 3.0, 0.2]
    x[1, 0] = 0.0
    found = picks.distributions(x, temperature)
    assert found is not None
    exact = (x.double() / torch.tensor(temperature, dtype=torch.float64)[:, None]).softmax(-1)
    assert (found - exact).abs().max() < 2e-6
    some = exact > 1e-30
    # the exponent of a small one is a rounded number below 70
    assert ((found - exact).abs() / exact)[some].max() < 5e-5
    assert not found[1, 3::3].any() and (found.double().sum(-1) - 1).abs().max() < 1e-6
    for i, t in enumerate(temperature):
        assert torch.equal(picks.distributions(x[i : i + 1], [t])[0], found[i])  # type: ignore[index]


def test_a_point_mass_is_on_the_first_largest_entry_and_what_is_not_finite_shows() -> None:
    x = torch.zeros(4, 300)
    x[0, [250, 20]] = 1.0
    x[1, 7], x[2], x[3, 299] = torch.nan, -torch.inf, torch.inf
    greedy = picks.distributions(x, [0.0] * 4)
    warm = picks.distributions(x, [1.0] * 4)
    assert greedy is not None and warm is not None
    assert greedy[0].nonzero().tolist() == [[20]] and (greedy.sum(-1) == 1).all()
    assert greedy[3].nonzero().tolist() == [[299]]
    assert warm[1].isnan().all() and warm[2].isnan().all() and warm[3].isnan().any() and not warm[0].isnan().any()
    peaks = picks.peaks(x)
    assert peaks is not None
    assert (peaks[0], peaks[2], peaks[3]) == (1.0, -torch.inf, torch.inf) and peaks[1] != peaks[1]
