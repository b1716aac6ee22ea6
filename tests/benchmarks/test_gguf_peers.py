"""The benchmark beside llama.cpp on GGUF files: its settings, its tables, and the page they are put into."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.peers import arms, gguf_arms, native_llama, pool, report, rows


def _load(monkeypatch, **options: object) -> list[str]:
    monkeypatch.syspath_prepend(str(arms.HERE))
    import channel
    import worker_llama_server

    what = channel.Load("t.gguf", "d.gguf", "auto", 1, 1024, 2, {"program": "llama-server", **options})
    return worker_llama_server.command_line(what, 8000)


def test_server_is_plain_unless_a_draft_has_a_length(monkeypatch):
    line = _load(monkeypatch, repack=False)
    assert "--no-repack" in line
    assert "--model-draft" not in line
    assert line[line.index("--threads") + 1] == "2"


def test_server_drafts_as_long_as_asked_and_never_stops_early(monkeypatch):
    line = _load(monkeypatch, length=3, sampled=True)
    assert "--no-repack" not in line
    told = {flag: line[line.index(flag) + 1] for flag in line if flag.startswith("--spec")}
    assert told == {
        "--spec-type": "draft-simple",
        "--spec-draft-n-max": "3",
        "--spec-draft-n-min": "0",
        "--spec-draft-p-min": "0",
        "--spec-draft-sampling": "probabilistic",
    }


def test_worker_of_a_program_is_there_if_the_program_is(tmp_path):
    program = tmp_path / "server"
    worker = arms.Worker("x", "x.py", Path(sys.executable), "", program=program)
    assert pool.installed(worker) is None
    program.touch()
    assert pool.installed(worker) == "server"


@pytest.mark.parametrize("compiled", [True, False])
def test_the_wheel_stands_beside_what_is_compiled_or_in_its_place(monkeypatch, tmp_path, compiled):
    monkeypatch.setattr(native_llama, "PROGRAM", Path(sys.executable) if compiled else tmp_path / "none")
    found = gguf_arms.arms([1, 3], True, True, Path(sys.executable))
    engines = {arm.engine for arm in found}
    assert engines == ({"ours", "llama.cpp", gguf_arms.WHEEL} if compiled else {"ours", "llama.cpp"})
    scripts = {arm.worker.script for arm in found if arm.engine == "llama.cpp"}
    assert scripts == ({"worker_llama_server.py"} if compiled else {"worker_xllama.py"})
    assert len({arm.name for arm in found}) == len({arm.worker.name for arm in found if arm.engine != "ours"}) + 3


GREEDY, SAMPLED = "batch 1, greedy", "batch 1, temperature 1"
TIMED = {
    "kind": "rows",
    "name": "160m-0.8-q8_0",
    "command": "python benchmarks/gguf_rows.py",
    "threads": 2,
    "date": "today",
    "machine": {"cores": 2},
    "versions": {"outrider": "0"},
    "samples": {
        **{f"ours target {n}": [0.010 if n < 5 else 0.012] * 3 for n in rows.ROWS},
        **{f"llama.cpp target {n}": [0.010 * n] * 3 for n in rows.ROWS},
        **{f"llama.cpp, as stored target {n}": [0.020 * n] * 3 for n in rows.ROWS},
        "ours draft 1": [0.001] * 3,
    },
}


def _gguf() -> dict:
    plain = {"ours plain": [_sample(0.64)] * 3, "llama.cpp plain": [_sample(0.96)] * 3}
    drafted = {"ours 3": [_sample(0.32, 32)] * 3, "llama.cpp 2": [_sample(1.0, 40)] * 3}
    return {
        "kind": "gguf",
        "name": "160m-0.8-q8_0",
        "type": "q8_0",
        "clock": "seconds",
        "command": "python benchmarks/gguf_files.py",
        "setting": {"files": {"target-q8_0.gguf": 2e8}, "prompt": 16, "tokens": 64, "threads": 2},
        "rounds": 3,
        "date": "today",
        "machine": {"cores": 2},
        "workers": {"ours": {"versions": {"torch": "2"}}},
        "arms": {
            "ours plain": ["ours", "plain"],
            "ours 3": ["ours", "speculative"],
            "llama.cpp plain": ["llama.cpp", "plain"],
            "llama.cpp 2": ["llama.cpp", "speculative"],
        },
        "scenarios": {GREEDY: {}, SAMPLED: {}},
        "samples": {GREEDY: plain | drafted, SAMPLED: plain | drafted},
    }


def _sample(seconds: float, calls: int = 64) -> dict:
    return {"tokens": 64, "seconds": seconds, "cpu": seconds, "calls": calls}


def _row(page: str, start: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_report_compares_with_the_best_of_the_peer_and_settles_goals():
    page = gguf_arms.section(_gguf())
    assert _row(page, "ours plain / llama.cpp plain")[2:6] == ["1.50", "1.50 to 1.50", "1", "yes"]
    best = f"ours speculative / best of llama.cpp | {SAMPLED}"
    assert _row(page, best)[2:7] == ["3.00", "3.00 to 3.00", "1.8", "yes", "ours 3 / llama.cpp plain"]


def test_prediction_is_tokens_over_the_time_of_rows_and_drafts():
    assert rows.predicted(TIMED, 3, 2.0) == pytest.approx(2.0 * 10 / (10 + 3 * 1))
    row = _row(gguf_arms.section(_gguf(), TIMED), f"ours 3 | {SAMPLED}")
    assert row[2:] == ["2.00", "1.54", "2.00 (2.00 to 2.00)", "1.30"]


def test_one_round_settles_no_goal():
    once = TIMED | {"samples": {key: found[:1] for key, found in TIMED["samples"].items()}}
    row = _row(rows.section([once]), "160m-0.8-q8_0")
    assert [row[i] for i in (4, 6, 8, 10)] == ["1: open", "0.6: open", "1.15: open", "1.25: open"]


def test_a_completion_counts_target_calls_and_forgets_the_one_before(monkeypatch):
    monkeypatch.syspath_prepend(str(arms.HERE))
    import channel
    import completion

    answers = [
        {"tokens": [1] * 8, "timings": {"draft_n": 9, "draft_n_accepted": 5}},
        {"tokens": [1] * 8, "timings": {}},
    ]
    asked = []
    run = completion.runner(lambda body: asked.append(body) or answers[len(asked) - 1])
    command = channel.Command([[3, 4]], 8, 0.5, 7, {})
    drafted, plain = run(command), run(command)
    assert (drafted["calls"], drafted["drafted"], plain["calls"], plain["drafted"]) == (3, 9, 8, 0)
    assert asked[0]["prompt"] == [3, 4] and asked[0]["n_predict"] == 8 and asked[0]["temperature"] == 0.5


def test_rows_are_compared_with_the_better_layout():
    page = rows.section([TIMED])
    row = _row(page, "160m-0.8-q8_0")
    assert row[3:7] == ["1.00 (1.00 to 1.00)", "1: yes", "0.25 (0.25 to 0.25)", "0.6: yes"]
    assert row[7:] == ["1.00 (1.00 to 1.00)", "1.15: yes", "1.20 (1.20 to 1.20)", "1.25: yes"]


def test_a_page_keeps_what_no_file_replaces():
    page = "# Title\n\nHead.\n\n## a\n\nold\n\n## b\n\nkept\n\n" + report.AFTER + "\n\nwords\n"
    merged = report.merged(page, ["## a\n\nnew\n", "## c\n\nadded\n"])
    assert (
        merged == "# Title\n\nHead.\n\n## a\n\nnew\n\n## b\n\nkept\n\n## c\n\nadded\n\n" + report.AFTER + "\n\nwords\n"
    )
    assert report.merged(merged, ["## a\n\nnew\n"]) == merged
