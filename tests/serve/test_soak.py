"""The soak's own short form: a minute of mixed traffic against a server in a process of its own, and its books."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from outrider.assets import shipped, shipped_prompts

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def _load(name: str) -> ModuleType:
    """A benchmark script as a module. Scripts import their neighbours by bare names, so they are loaded first."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_load("serve_load")
soak = _load("soak")


def books(**wrong: float) -> dict[str, float]:
    """Counters of a server that has done ten requests, with some of them wrong."""
    ends = {"stop": 4.0, "length": 5.0, "abort": 1.0, "error": 0.0}
    found = {f"vllm:request_success_total {k}": v for k, v in ends.items()} | {"outrider_requests_started_total": 10.0}
    return found | {"outrider_http_responses_total 200": 10.0} | {k.replace("__", " "): v for k, v in wrong.items()}


def judged(descriptors: tuple[int, ...] = (7, 8, 7), memory: int = 0, **wrong: float) -> object:
    """A soak that went well but for what is said."""
    out = soak.Soak()
    out.readings = [soak.Reading(float(i), 10**8 + memory * i, n) for i, n in enumerate(descriptors)]
    out.sent.update({"good": 9, "hang up": 1})
    out.kinds.update({"ok": 9, "hung up": 1})
    out.statuses.update({200: 10})
    soak.judge(out, books(**wrong))
    return out


def test_the_judge_sees_every_planted_fault() -> None:
    assert judged().faults == []  # type: ignore[attr-defined]
    for wrong in (
        {"vllm:request_success_total__stop": 3.0},
        {"vllm:request_success_total__error": 1.0},
        {"outrider_requests_started_total": 11.0},
        {"outrider_http_responses_total__500": 1.0},
    ):
        assert len(judged(**wrong).faults) >= 1, wrong  # type: ignore[attr-defined]
    assert judged(descriptors=(7, 8, 11)).faults  # type: ignore[attr-defined]
    slope = judged(descriptors=(7,) * 30, memory=10**6).slope(10)  # type: ignore[attr-defined]
    assert slope[0] == pytest.approx(60.0)  # a megabyte a minute
    assert judged().slope(1) is None  # type: ignore[attr-defined]


@pytest.mark.slow
def test_t14_a_minute_of_everything() -> None:
    """The shipped draft as a target, so that requests are the load. `benchmarks/soak.py` runs for half an hour."""
    served = soak.Served(["--target", str(shipped("draft")), "--draft", "ngram", "--slots", "4"])
    try:
        served.wait()
        mix = soak.Mix("soaked", [p[-400:] for p in shipped_prompts()], 32, 0)
        out = soak.run(served, mix, minutes=1.0, rate=6.0, pause=12.0)
    finally:
        code = served.end()
    first, last = out.readings[0], out.readings[-1]
    print(
        f"\nT14: {sum(out.sent.values())} requests in {last.minute:.1f} minutes, clients saw {dict(out.kinds)}; ",
        end="",
    )
    print(f"{(last.memory - first.memory) / 1e6:+.1f} MB; descriptors {[r.descriptors for r in out.readings]}")
    assert not out.faults and code == 0
    assert last.memory - first.memory < 60e6  # it is still warming up
