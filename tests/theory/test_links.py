"""Communication of split models: limits, the two ways of an all-reduce, and what the roofline makes of them."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.theory import links
from outrider.theory.hardware import HARDWARE, MODELS
from outrider.theory.links import LINKS, Link, all_reduce, handover_seconds, pipeline_seconds, tensor_seconds
from outrider.theory.roofline import Setting, draft_forward, forward, predict

H100, NVLINK = HARDWARE["h100"], LINKS["nvlink4"]


def test_doctests() -> None:
    result = doctest.testmod(links)
    assert result.attempted and not result.failed


@given(size=st.floats(1, 1e10), devices=st.integers(2, 64), name=st.sampled_from(sorted(LINKS)))
def test_an_all_reduce_moves_what_it_must(size: float, devices: int, name: str) -> None:
    """No faster than a latency and 2 (t - 1) / t of the bytes (the lower bound), and a free link costs nothing."""
    over = LINKS[name]
    seconds = all_reduce(size, devices, over)
    assert seconds >= 2 * (devices - 1) / devices * size / over.bandwidth * (1 - 1e-12)
    assert seconds >= over.latency
    assert seconds <= 2 * (devices - 1) * over.latency + 2 * size / over.bandwidth  # a ring does it
    assert all_reduce(size, 1, over) == 0.0
    assert all_reduce(2 * size, devices, over) >= seconds
    assert all_reduce(size, devices, Link("free", 1e30, 0.0, "none")) < 1e-12


def test_small_messages_are_latency_and_large_ones_bandwidth() -> None:
    assert all_reduce(1.0, 8, NVLINK) == pytest.approx(NVLINK.latency, rel=1e-3)
    assert all_reduce(1e9, 8, NVLINK) == pytest.approx(2 * 7 / 8 * 1e9 / NVLINK.bandwidth, rel=0.03)


@given(
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.sampled_from([1, 2, 4]),
    batch=st.integers(1, 200),
    rows=st.integers(1, 9),
    efficiency=st.floats(0.2, 1.0),
)
def test_a_link_adds_what_it_says_and_nothing_else(tensor, pipeline, batch, rows, efficiency) -> None:
    model = MODELS["70b"]
    free = Setting(H100, batch, 1000, tensor * pipeline, pipeline=pipeline, efficiency=efficiency)
    joined = replace(free, link=NVLINK)
    bare, found = forward(model, free, rows), forward(model, joined, rows)
    expected = tensor_seconds(model, batch * rows, tensor, NVLINK) + pipeline_seconds(
        model, batch * rows, pipeline, NVLINK
    )
    assert found.communication == pytest.approx(expected) and bare.communication == 0.0
    assert found.seconds - bare.seconds == pytest.approx(expected, abs=1e-12)
    assert bare.seconds == pytest.approx(forward(model, replace(free, efficiency=1.0), rows).seconds / efficiency)
    one_stage = forward(model, replace(free, devices=tensor, pipeline=1), rows)
    assert bare.seconds == pytest.approx(one_stage.seconds)  # a sequence passes all stages: no faster than one of them


def test_stages_multiply_throughput_and_not_the_speed_of_a_sequence() -> None:
    pair = MODELS["70b"], MODELS["1b"]
    two = predict(*pair, Setting(H100, 8, 1000, 8, pipeline=2), 0.8)
    one = predict(*pair, Setting(H100, 8, 1000, 4), 0.8)
    assert two.plain.tokens_per_second == pytest.approx(2 * one.plain.tokens_per_second)
    assert two.memory > one.memory  # the cache of two batches


def test_speculation_gains_less_from_devices_that_wait_for_each_other() -> None:
    """All-reduces of a drafted token cost as much as those of a target's layer each: on a slow link drafting is not worth it."""
    pair = MODELS["8b"], MODELS["1b"]
    gains = [
        predict(*pair, Setting(H100, 1, 1000, 8, link=over), 0.7).best.speedup
        for over in (None, NVLINK, LINKS["pcie5"], Link("slow", 1e9, 2e-4, "made up"))
    ]
    assert gains == sorted(gains, reverse=True) and gains[-1] < gains[0] - 0.1
    split = Setting(H100, 1, 1000, 8, link=LINKS["pcie5"])
    alone = replace(split, draft_devices=1)
    assert draft_forward(MODELS["1b"], alone).communication == 0.0
    assert draft_forward(MODELS["1b"], split).communication > 0.0


def test_a_prompt_that_is_handed_over_costs_its_cache() -> None:
    seconds = handover_seconds(MODELS["70b"], 1000, LINKS["ib-ndr"])
    assert seconds == pytest.approx(LINKS["ib-ndr"].latency + 1000 * 327_680 / 50e9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: links.link("wet string"), "known: nvlink3"),
        (lambda: Link("x", 0.0, 0.0, ""), "bandwidth"),
        (lambda: Setting(H100, devices=8, pipeline=3), "equal stages"),
        (lambda: Setting(H100, devices=2, draft_devices=4), "draft cannot have"),
        (lambda: Setting(H100, efficiency=0.0), "efficiency"),
    ],
)
def test_refusals(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
