"""Rows that have no distribution, and what the pipeline checks of its input and leaves as it was."""

import math

import pytest
import torch

from outrider.engine.sanitize import blank_nonfinite_rows
from outrider.errors import CapabilityError, ConfigError
from outrider.sampling import LogitsPipeline, SamplingParams, logprobs_of
from tests.sampling.test_sampling_law import INF, MIXED, view


def test_finite_rows():
    x = torch.zeros(6, 50)
    x[1, 7] = math.nan
    x[2, 8] = INF
    x[3, :49] = -INF
    x[4] = -INF
    x[5, 3], x[5, 4] = -INF, math.nan
    before = x.clone()
    assert blank_nonfinite_rows(x) == [1, 2, 4, 5]
    assert (
        torch.equal(x[[0, 3]], before[[0, 3]]) and not x[[1, 2, 4, 5]].any()
    )  # blanked, and their neighbours are as they were
    assert blank_nonfinite_rows(x[:0]) == []


@pytest.mark.parametrize("vocab", [40, 4000])
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_a_broken_row_does_not_disturb_its_neighbours(bad, vocab):
    params = [p for p in MIXED for _ in range(3)]
    x = torch.randn(len(params), vocab, generator=torch.Generator().manual_seed(1))
    views = [view([1, 2, 3], 1, p, slot=i) for i, p in enumerate(params)]
    good = LogitsPipeline(vocab)(x, views, [()] * len(params))
    x[1::3] = bad
    distribution = LogitsPipeline(vocab)(x, views, [()] * len(params))
    keep = [i for i in range(len(params)) if i % 3 != 1]
    assert torch.equal(distribution[keep], good[keep])


def test_logits_are_not_changed():
    x = torch.randn(len(MIXED), 300)
    before = x.clone()
    LogitsPipeline(300)(x, [view([1, 2], 1, p, slot=i) for i, p in enumerate(MIXED)], [(4,)] * len(MIXED))
    assert torch.equal(x, before)


def test_half_precision_is_raised_to_float32_and_no_rows_are_fine():
    assert (
        LogitsPipeline(5)(torch.zeros(1, 5, dtype=torch.bfloat16), [view([1], 1, SamplingParams())], [()]).dtype
        == torch.float32
    )
    assert LogitsPipeline(5)(torch.zeros(0, 5), [], []).shape == (0, 5)


def test_shapes_and_options_are_checked():
    with pytest.raises(CapabilityError, match="map the draft's vocabulary"):
        LogitsPipeline(5)(torch.zeros(1, 4), [view([1], 1, SamplingParams())], [()])
    with pytest.raises(ConfigError):
        LogitsPipeline(0)
    with pytest.raises(ConfigError, match="end-of-sequence"):
        LogitsPipeline(5, (5,))


def test_logprobs_are_of_the_raw_logits():
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(3)).double()
    x[1, 4] = x[1, 9] = 5.0
    got = logprobs_of(x, [4, 4, 0], 3)
    want = x - x.exp().sum(-1, keepdim=True).log()
    assert got.chosen == pytest.approx([want[0, 4].item(), want[1, 4].item(), want[2, 0].item()])
    assert [t for t, _ in got.top[1]][:2] == [4, 9]
    for row, pairs in zip(want, got.top, strict=True):
        assert [v for _, v in pairs] == pytest.approx(sorted(row.tolist(), reverse=True)[:3])
        assert all(row[t].item() == pytest.approx(v) for t, v in pairs)
    assert logprobs_of(x, [1, 2, 3], 0).top == [[], [], []]
    assert len(logprobs_of(x, [1, 2, 3], 50).top[0]) == 20
    assert logprobs_of(x[:0], [], 5).chosen == []
