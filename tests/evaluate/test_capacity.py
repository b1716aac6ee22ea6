"""Step tables, traffic, the fewest replicas, and plans on paper."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from outrider.errors import ConfigError
from outrider.evaluate.planning import capacity, paper, step_table
from outrider.evaluate.planning.capacity import Target
from outrider.records import Counts
from outrider.theory.fleet import Failures, poisson, simulate
from outrider.theory.hardware import HARDWARE, MODELS
from outrider.theory.links import LINKS
from outrider.theory.roofline import Setting, predict


def truth(decoding: int, length: int, rows: int) -> float:
    return (0.002 + 0.0005 * decoding * (1 + 0.3 * length) if decoding else 0.0) + (1.5e-4 if length else 1e-4) * rows


def counted(length: int, acceptance: float, steps: int) -> Counts:
    """Exactly the expected counts of independent acceptances."""
    out = Counts()
    judged = steps
    for _ in range(length):
        out.judged_at.append(judged)
        judged = round(judged * acceptance)
        out.accepted_at.append(judged)
    return out


def made(noise: float = 0.0) -> step_table.StepTable:
    rng = np.random.default_rng(0)
    steps = [
        (n, b, rows, truth(b, n, rows) * float(rng.normal(1, noise)))
        for n in (0, 2, 4)
        for b in (1, 2, 4, 8)
        for rows in (0,) * 12 + (64, 128, 256)
    ]
    steps += [(n, 0, rows, truth(0, n, rows)) for n in (0, 2, 4) for rows in (64, 128, 256) for _ in range(3)]
    return step_table.build_table(steps, {n: counted(n, 0.7, 10_000) for n in (2, 4)})


def test_a_table_gives_back_the_machine_it_was_measured_on() -> None:
    table = made()
    for n in (0, 2, 4):
        for b in (1, 2, 3, 5, 8, 10):
            assert table.seconds(b, n, 0) == pytest.approx(truth(b, n, 0), rel=1e-9)
            assert table.seconds(b, n, 128) == pytest.approx(
                truth(b, n, 128), rel=1e-9
            )  # the drafter reads prompts too
    assert table.acceptance(4) == pytest.approx((0.7,) * 4, rel=1e-3)
    noisy = made(0.05)
    for n in (0, 2, 4):
        row = [noisy.seconds(b, n, 0) for b in range(1, 9)]
        assert row == sorted(row)  # more sequences cannot take less time
    assert np.mean(noisy.spread) == pytest.approx(1.0) and np.std(noisy.spread) == pytest.approx(0.05, rel=0.3)


def test_serving_adds_to_every_step_that_decodes() -> None:
    plain, served = made(), made().served(0.004, 0.001)
    for length in (0, 2, 4):
        for b in (1, 3, 8):
            more = served.seconds(b, length, 16) - plain.seconds(b, length, 16)
            assert more == pytest.approx(0.004 + 0.001 * b)
        assert served.seconds(0, length, 16) == plain.seconds(0, length, 16)
    assert served.acceptance(4) == plain.acceptance(4) and plain.decode != served.decode


def test_lengths_fall_where_rows_cost() -> None:
    lengths = made().best_lengths(8)
    tokens = {0: 1.0, 2: 1 + 0.7 + 0.49, 4: 1 + 0.7 + 0.49 + 0.343 + 0.2401}
    for b in range(1, 9):
        best = max(tokens, key=lambda n: tokens[n] / truth(b, n, 0))
        assert tokens[lengths[b]] / truth(b, lengths[b], 0) == pytest.approx(tokens[best] / truth(b, best, 0), rel=1e-3)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="too few steps"):
        step_table.build_table([(0, 1, 0, 0.1)], {})
    with pytest.raises(ConfigError, match="no step read a prompt"):
        step_table.build_table([(0, 1, 0, 0.1)] * 5, {})


def test_the_fewest_replicas_are_the_fewest() -> None:
    traffic = poisson(60.0, 600, [100, 300], [30, 60], seed=1)
    replica = made().replica(8, True)
    target = Target(ttft=0.15, itl=0.01, percentile=90)

    def run(n: int):
        return simulate(traffic, replica, n, seed=3)

    for start in (1, 2, 50):
        found = capacity.fewest(run, target, start)
        assert found is not None
        number, out = found
        assert target.met(out) and not target.met(run(number - 1))
    assert capacity.fewest(run, Target(ttft=1e-9)) is None  # no number of replicas is that fast
    plans = capacity.plan_fleet(
        traffic, {"speculative": replica, "plain": made().replica(8, False)}, target, price=2.0, seed=3
    )
    few, plain = plans["speculative"]["fewest"], plans["plain"]["fewest"]
    assert few["replicas"] == number <= plain["replicas"]
    assert few["price_per_hour"] == 2.0 * number and few["itl"]["p50"] < plain["itl"]["p50"]
    assert few["ttft"]["p50"] <= few["ttft"]["p95"] <= few["ttft"]["p99"]


def test_a_request_that_is_lost_meets_no_target() -> None:
    traffic, target = poisson(4.0, 200, [100], [200], seed=1), Target(ttft=60.0, percentile=50)
    replica = made().replica(8, False)
    assert target.met(simulate(traffic, replica, 2, seed=3))
    broken = simulate(traffic, replica, 2, failures=Failures(0.05, 0.01), seed=3)
    assert not broken.whole.any() and not target.met(broken)
    again = simulate(traffic, replica, 2, failures=Failures(20.0, 0.1, retries=3), seed=3)
    assert again.whole.all() and target.met(again)


def test_traffic_is_read_and_bad_rows_are_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        "\n".join(
            json.dumps(r)
            for r in (
                {"timestamp": 2000, "input_length": 30, "output_length": 4, "hash_ids": [1]},
                {"timestamp": 500, "input_length": 10, "output_length": 0},
                {"arrival": 1.0, "prompt_tokens": 20, "output_tokens": 2},
            )
        )
    )
    traffic = capacity.read_traffic(str(trace), [1], [1], 10, 0)
    assert traffic.arrival.tolist() == [0.0, 0.5, 1.5]
    assert traffic.prompt.tolist() == [10, 20, 30] and traffic.output.tolist() == [1, 2, 4]
    assert len(capacity.read_traffic("poisson:3", [7], [9], 20, 0).arrival) == 20
    for text, says in (
        ("poisson:0", "requests a second"),
        ("poisson:x", "requests a second"),
        ("no/such/file", "neither poisson:RATE nor a file"),
    ):
        with pytest.raises(ConfigError, match=says):
            capacity.read_traffic(text, [1], [1], 10, 0)
    for row, says in (
        ("{", "not JSON"),
        ("{}", "expected arrival"),
        ('{"arrival": -1}', "must be numbers"),
        ("[]", "expected"),
        ('{"arrival": 1, "prompt_tokens": 1, "output_tokens": 1e11}', "at most"),
        ('{"arrival": 1, "prompt_tokens": 1.5, "output_tokens": 2}', "whole numbers"),
    ):
        trace.write_text('{"arrival": 0, "prompt_tokens": 1, "output_tokens": 1}\n' + row)
        with pytest.raises(ConfigError, match=f"jsonl:2: .*{says}"):
            capacity.read_traffic(str(trace), [1], [1], 10, 0)


def on_paper(gpus: int = 8, **more: object) -> paper.Paper:
    wish = {
        "target": MODELS["70b"], "draft": MODELS["1b"], "hardware": HARDWARE["h100"], "gpus": gpus, "link": LINKS["nvlink4"],
        "between": LINKS["ib-ndr"], "acceptance": 0.8, "context": 2048, "output": 256, "efficiency": 0.7,
    }  # fmt: skip
    return paper.Paper(**(wish | more))  # type: ignore[arg-type]


def test_layouts_use_every_gpu_once() -> None:
    for gpus in (1, 6, 8, 16):
        found = list(paper.layouts(gpus))
        assert len(set(found)) == len(found) and all(c * t * p == gpus for c, t, p in found)
    assert (1, 8, 1) in paper.layouts(8) and (2, 2, 2) in paper.layouts(8)


def test_a_plan_on_paper_ranks_what_fits_and_says_what_it_assumes() -> None:
    plans = paper.plan_on_paper(on_paper(), [1, 64], [0, 2, 4, 6])
    for total, entries in plans.items():
        speeds = [e.tokens_per_second for e in entries]
        assert speeds == sorted(speeds, reverse=True)
        for e in entries:
            assert e.memory_per_gpu <= 80e9 and e.copies * e.pipeline <= total
            assert e.speedup >= 1 and e.tokens_per_second >= e.plain * 0.999
    assert plans[1][0].name == "tensor 8"  # one sequence: nothing else has work
    assert plans[64][0].communication > plans[1][0].communication
    said = " ".join(paper.assumptions(on_paper()))
    for word in ("70% of the rates", "NVLink 4", "assumed", "InfiniBand NDR", "independently", "two all-reduces"):
        assert word in said
    with pytest.raises(ConfigError, match="cannot hold"):
        paper.plan_on_paper(on_paper(1), [1], [0, 2])


@pytest.mark.parametrize(("sequences", "cut", "read_again"), [(1, 8, 6), (64, 7, 4), (256, 3, 2)])
def test_a_state_that_cannot_be_cut_has_shorter_drafts_planned(sequences: int, cut: int, read_again: int) -> None:
    """The more sequences, the dearer the rows that are read again; the speed is that of the theory's own prediction."""
    lengths = range(9)
    usual = paper.plan_on_paper(on_paper(), [sequences], lengths)[sequences][0]
    recurrent = on_paper(recurrent=True)
    found = paper.plan_on_paper(recurrent, [sequences], lengths)[sequences][0]
    assert (usual.length, found.length) == (cut, read_again) and usual.name == found.name
    assert 1 < found.speedup < usual.speedup
    of_copy = -(-sequences // (found.copies * found.pipeline))
    setting = Setting(
        HARDWARE["h100"], of_copy, 2048, found.tensor, link=LINKS["nvlink4"], between=LINKS["ib-ndr"],
        draft_devices=found.draft_devices, efficiency=0.7, recurrent=True,
    )  # fmt: skip
    theory = predict(MODELS["70b"], MODELS["1b"], setting, 0.8, lengths).best
    assert (theory.length, theory.speedup) == (found.length, pytest.approx(found.speedup, rel=1e-12))
    assert "cannot be cut" in " ".join(paper.assumptions(recurrent))


def test_prompts_read_elsewhere_cost_a_handover_and_twice_the_gpus() -> None:
    here = paper.plan_on_paper(on_paper(), [64], [0, 3])[64][0]
    there = paper.plan_on_paper(on_paper(disaggregated=True), [64], [0, 3])[64][0]
    assert there.first_token > here.first_token and there.tokens_per_second == here.tokens_per_second
    assert there.served_per_gpu == pytest.approx(there.tokens_per_second / 16)
    assert here.served_per_gpu < here.tokens_per_second / 8
