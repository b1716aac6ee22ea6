"""The roofline: limits, regimes, memory; and the tables against numbers anyone can look up."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.theory import hardware, roofline
from outrider.theory.hardware import HARDWARE, MODELS, Mixture
from outrider.theory.recurrent import reread
from outrider.theory.roofline import Setting, forward, predict, self_draft_crossing, self_draft_speedup
from outrider.theory.speedup import speedup, tokens_per_call

H100 = HARDWARE["h100"]


@pytest.mark.parametrize("module", [hardware, roofline])
def test_doctests(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


@pytest.mark.parametrize(
    ("name", "kv_bytes", "billions"),
    [("70b", 327_680, 70.6), ("8b", 131_072, 8.0), ("7b", 524_288, 6.7), ("13b", 819_200, 13.0), ("1b", 32_768, 1.24)],
)
def test_known_architectures(name: str, kv_bytes: int, billions: float) -> None:
    assert MODELS[name].kv_bytes() == kv_bytes
    assert MODELS[name].parameters == pytest.approx(billions * 1e9, rel=0.01)


def test_weight_bound_is_the_closed_form() -> None:
    """Batch 1, no context: verification is free and the draft costs its share of the weights (Leviathan et al.)."""
    setting = Setting(H100, batch=1, context=0)
    p = predict(MODELS["8b"], MODELS["1b"], setting, 0.8)
    ratio = MODELS["1b"].parameters / MODELS["8b"].parameters
    for row in p.rows:
        assert row.verify_seconds == p.plain.verify_seconds
        assert row.speedup == pytest.approx(speedup(0.8, row.length, ratio) if row.length else 1.0)
    assert (p.plain_bottleneck, p.draft_bottleneck, p.verify_bottleneck) == ("weights",) * 3
    assert p.plain.tokens_per_second == pytest.approx(3.35e12 / (2 * 8.030e9))
    assert p.predicted is True


def test_compute_bound_loses() -> None:
    p = predict(MODELS["8b"], MODELS["1b"], Setting(H100, batch=1024, context=0, devices=8), 0.9)
    assert p.best.length == 0 and p.best.speedup == 1.0
    assert p.plain_bottleneck == "compute"
    assert all(row.speedup < 1 for row in p.rows[1:])
    for row in p.rows:  # every row is paid for
        assert row.verify_seconds == pytest.approx((row.length + 1) * p.plain.verify_seconds)


def test_kv_bound_gains_with_the_batch() -> None:
    """MagicDec: at long context, with a short window for the draft, the speed-up grows with the batch towards Omega."""
    gains = []
    for batch in (1, 4, 16, 64, 256):
        setting = Setting(H100, batch=batch, context=32_000, devices=8, draft_context=512)
        p = predict(MODELS["8b"], MODELS["8b"], setting, 0.8, lengths=(0, 4))
        gains.append(p.rows[1].speedup)
        if batch >= 16:
            assert p.plain_bottleneck == "kv"
    assert gains == sorted(gains)
    assert gains[0] < 1 < gains[-1] < tokens_per_call(0.8, 4)
    assert gains[-1] > 0.85 * tokens_per_call(0.8, 4)
    full = predict(MODELS["8b"], MODELS["8b"], Setting(H100, batch=256, context=32_000, devices=8), 0.8, lengths=(4,))
    assert full.rows[1].speedup < 1  # negative control: with the whole cache a draft as large as the target cannot pay


@given(
    batch=st.integers(1, 300),
    context=st.integers(0, 50_000),
    alpha=st.floats(0, 1),
    target=st.sampled_from(sorted(MODELS)),
    draft=st.sampled_from(sorted(MODELS)),
    machine=st.sampled_from(sorted(HARDWARE)),
)
def test_invariants(batch, context, alpha, target, draft, machine) -> None:
    setting = Setting(HARDWARE[machine], batch=batch, context=context)
    p = predict(MODELS[target], MODELS[draft], setting, alpha, lengths=range(9))
    assert p.best.speedup >= 1
    assert p.plain.length == 0 and p.plain.speedup == 1
    verify = [row.verify_seconds for row in p.rows]
    assert verify == sorted(verify)
    assert all(row.speedup <= row.tokens_per_call + 1e-12 for row in p.rows)
    assert p.memory <= p.devices_needed * roofline.USABLE * setting.hardware.memory * (1 + 1e-12)
    assert p.fits == (p.devices_needed == 1)
    twice = forward(MODELS[target], replace(setting, devices=2))
    assert twice.seconds == pytest.approx(forward(MODELS[target], setting).seconds / 2)


def test_memory() -> None:
    p = predict(MODELS["70b"], MODELS["1b"], Setting(H100, batch=8, context=4096), 0.8)
    weights = 2 * (70.554e9 + 1.236e9)
    kv = 8 * (4096 + 17) * (327_680 + 32_768)
    assert p.memory == pytest.approx(weights + kv)
    assert p.devices_needed == 3 and not p.fits
    assert predict(MODELS["70b"], MODELS["1b"], Setting(H100, batch=8, context=4096, devices=3), 0.8).fits


def test_free_sizes_scale() -> None:
    sizes = [hardware.model(s) for s in ("160m", "1.7b", "3e9", "20b", "200B")]
    assert [m.parameters for m in sizes] == [160e6, 1.7e9, 3e9, 20e9, 200e9]
    per_token = [m.kv_bytes() for m in sizes]
    assert per_token[0] < per_token[1] and all(k > 0 for k in per_token)
    assert all(m.source.startswith("scaled from") for m in sizes)


def test_only_the_measured_machine_says_so() -> None:
    assert [name for name, h in HARDWARE.items() if h.measured] == ["zen5-2"]
    assert HARDWARE["zen5-2"].source.startswith("measured")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: hardware.hardware("tpu"), "known: zen5-2"),
        (lambda: hardware.model("big"), "no size"),
        (lambda: hardware.model("0b"), "no size"),
        (lambda: Setting(H100, batch=0), "batch"),
        (lambda: Setting(H100, context=-1), "context"),
        (lambda: Setting(H100, element=0.0), "bytes of a weight"),
        (lambda: replace(H100, bandwidth=0.0), "bandwidth"),
        (lambda: predict(MODELS["8b"], MODELS["1b"], Setting(H100), 1.5), "acceptance"),
        (lambda: forward(MODELS["8b"], Setting(H100), 0), "rows"),
    ],
)
def test_bad_input_is_named(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("acceptance", [0.6, 0.8, 0.9])
@pytest.mark.parametrize("batch", [1, 8])
def test_self_drafting_pays_from_a_ratio_of_bytes_on(acceptance: float, batch: int) -> None:
    """With a small view and rows of 2%, drafts of one token cross first: (1 + rho) (acceptance - 0.02) = 1, at any batch."""
    model = MODELS["7b"]
    setting = Setting(H100, batch=batch, draft_context=1)
    context = self_draft_crossing(model, setting, acceptance)
    assert context is not None
    ratio = batch * model.kv_bytes() * context / model.weight_bytes()
    assert ratio == pytest.approx(1 / (acceptance - 0.02) - 1, abs=0.005)


def test_self_drafting_of_a_mixture_counts_the_experts_that_rows_read() -> None:
    """A step of one sequence reads few experts, so its cache weighs more; but each further row of a verification reads new ones."""
    mixed, one = MODELS["30b-a3b"], Setting(H100, draft_context=1)
    whole, active = (replace(mixed, parameters=n, mixture=None) for n in (mixed.parameters, mixed.active))
    least, found, most = (self_draft_crossing(m, one, 0.8) or 0 for m in (active, mixed, whole))
    assert 0 < least < found < most
    eight = replace(one, batch=8)
    assert (self_draft_crossing(mixed, eight, 0.8) or 0) > (self_draft_crossing(whole, eight, 0.8) or 0) > 0
    assert self_draft_crossing(replace(mixed, mixture=Mixture(8, 8, 28.991e9)), one, 0.8) == most, "every row reads all"


def test_self_drafting_never_pays_where_nothing_is_accepted() -> None:
    assert self_draft_crossing(MODELS["7b"], Setting(H100, draft_context=512), 0.0) is None
    assert self_draft_speedup(1.0, 3, 0.0, 1.0) == 4.0
    with pytest.raises(ValueError, match="draft_context"):
        self_draft_crossing(MODELS["7b"], Setting(H100), 0.8)


def test_a_target_whose_state_cannot_be_cut_reads_tokens_again() -> None:
    """Its verification is that of the rows and forwards that `theory.recurrent` counts, so that its best draft is shorter."""
    cut = Setting(HARDWARE["laptop-ddr5"], context=1024)
    uncut = replace(cut, recurrent=True)
    target, draft = MODELS["8b"], MODELS["1b"]
    plain, found = predict(target, draft, cut, 0.85), predict(target, draft, uncut, 0.85)
    assert found.plain == plain.plain and 0 < found.best.length < plain.best.length
    for row, other in zip(found.rows[1:], plain.rows[1:], strict=True):
        again = reread([0.85] * row.length)
        forwards = again.forwards * forward(target, cut).seconds
        assert row.read_again == again.rows and other.read_again == 0.0
        assert row.verify_seconds == pytest.approx(forward(target, cut, row.length + 1 + again.rows).seconds + forwards)
        assert row.speedup < other.speedup
    sure = [replace(row, read_again=0.0) for row in predict(target, draft, uncut, 1.0).rows]
    assert sure == list(predict(target, draft, cut, 1.0).rows)
