"""Other tools' result files: read to the same figures they report, and refused in a sentence when they break their own rules."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from outrider.cli.main import main
from outrider.errors import ConfigError
from outrider.evaluate.bench.latencies import differences
from outrider.evaluate.records import Record
from outrider.evaluate.store import importers, tables
from outrider.evaluate.store.importers import import_run, read_results
from outrider.evaluate.store.store import Store


def vllm(detailed: bool = True, scale: float = 1.0) -> dict:
    """Eight requests of `vllm bench serve --save-result`, the last one failed."""
    n = 8
    lists = {
        "input_lens": [10] * n,
        "output_lens": [5] * (n - 1) + [0],
        "ttfts": [0.1 * scale * (1 + i / 10) for i in range(n - 1)] + [0.0],
        "itls": [[0.02 * scale, 0.03 * scale]] * (n - 1) + [[]],  # chunks, fewer than tokens: speculation
        "generated_texts": ["x"] * n,
        "errors": [""] * (n - 1) + ["connection refused"],
    }
    return {
        "date": "20261121-060000", "backend": "vllm", "model_id": "m", "tokenizer_id": "m", "num_prompts": n,
        "request_rate": "inf", "burstiness": 1.0, "max_concurrency": 4, "duration": 2.0, "completed": n - 1, "failed": 1,
        "total_input_tokens": 80, "total_output_tokens": 35, "request_throughput": 3.5, "output_throughput": 17.5,
        "spec_decode_acceptance_rate": 50.0, "spec_decode_num_drafts": 12, "mean_ttft_ms": 130.0,
        **(lists if detailed else {}),
    }  # fmt: skip


def aiperf(n: int = 4) -> str:
    """`profile_export.jsonl`: a warm-up row, n good ones, one cancelled."""
    rows = []
    for i in range(n):
        metrics = {
            "time_to_first_token": {"value": 50.0 + i, "unit": "ms"},
            "request_latency": {"value": 0.25, "unit": "sec"},
            "output_sequence_length": {"value": 9, "unit": "tokens"},
            "inter_chunk_latency": {"value": [4.9, 5.3], "unit": "ms"},
        }
        spec = {"num_spec_steps": 3, "num_draft_tokens": 12, "num_accepted_draft_tokens": 6, "engine": "vllm"}
        meta = {"request_start_ns": 10**18 + i * 10**8, "request_end_ns": 10**18 + i * 10**8 + 250_000_000}
        meta["benchmark_phase"] = "profiling"
        rows.append({"metadata": meta, "metrics": metrics, "error": None, "spec_decode_acceptance": spec})
    gone = {"code": 499, "type": "RequestCancellationError", "message": "cancelled"}
    rows.append({"metadata": {"benchmark_phase": "profiling", "was_cancelled": True}, "metrics": {}, "error": gone})
    rows.append({"metadata": {"benchmark_phase": "warmup"}, "metrics": {}, "error": None})
    return "\n".join(map(json.dumps, rows)) + "\n"


def guidellm() -> dict:
    """`benchmarks.json` of a sweep of two."""
    spec = {"num_spec_steps": 8, "num_draft_tokens": 24, "num_accepted_draft_tokens": 12}
    good = {
        "type_": "generative_request_stats", "request_id": "a", "output_tokens": 20, "request_latency": 0.5,
        "time_to_first_token_ms": 40.0, "output": "text",
        "response_metrics": {"speculative_decoding": spec},
    }  # fmt: skip
    requests = {"successful": [good] * 3, "errored": [{"request_latency": None}], "incomplete": [good], "total": None}
    kinds = [{"strategy": {"type_": "synchronous"}}, {"strategy": {"type_": "concurrent", "streams": 4}}]
    return {"args": {}, "benchmarks": [{"config": k, "requests": requests, "duration": 2.0} for k in kinds]}


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_vllm(tmp_path: Path) -> None:
    found = read_results(written(tmp_path / "r.json", vllm()))
    assert found.kind == "vllm" and len(found.records) == 8
    summary = found.summary()["tasks"]["vllm"]
    assert (summary["failed"], summary["tokens"], summary["tokens_per_second"]) == (1, 35, 17.5)
    first = found.records[0].timings[0]
    assert (first.first, first.end, first.tokens) == pytest.approx((0.1, 0.15, 5))
    assert found.records[-1].failed == 1 and found.records[-1].timings == ()
    assert found.reported["output_throughput"] == summary["tokens_per_second"]
    assert found.reported["spec_decode_num_drafts"] == 12


def test_vllm_without_details_is_kept_as_reported(tmp_path: Path) -> None:
    found = read_results(written(tmp_path / "r.json", vllm(detailed=False)))
    assert not found.records and "--save-detailed" in found.note
    assert found.reported["mean_ttft_ms"] == 130.0


def test_aiperf(tmp_path: Path) -> None:
    found = read_results(written(tmp_path / "profile_export.jsonl", aiperf()))
    assert found.kind == "aiperf" and len(found.records) == 5
    summary = found.summary()["tasks"]["aiperf"]
    assert (summary["requests"], summary["failed"], summary["tokens"]) == (5, 1, 36)
    assert summary["seconds"] == pytest.approx(0.55)
    assert summary["acceptance_length"] == pytest.approx(3.0) and summary["draft_acceptance_rate"] == 0.5
    assert found.records[1].timings[0].first == pytest.approx(0.051)
    assert found.records[1].timings[0].end == pytest.approx(0.25)


def test_aiperf_figures_of_the_run(tmp_path: Path) -> None:
    figures = {
        "schema_version": "1.0",
        "aiperf_version": "0.13",
        "request_latency": {"unit": "ms", "avg": 12.5, "p99": 20.0},
    }
    found = read_results(written(tmp_path / "profile_export_aiperf.json", figures))
    assert found.reported["request_latency"]["avg"] == 12.5 and not found.records


def test_guidellm(tmp_path: Path) -> None:
    found = read_results(written(tmp_path / "benchmarks.json", guidellm()))
    tasks = found.summary()["tasks"]
    assert list(tasks) == ["0 synchronous", "1 concurrent"]
    assert (tasks["1 concurrent"]["requests"], tasks["1 concurrent"]["failed"]) == (4, 1)
    assert tasks["1 concurrent"]["acceptance_length"] == pytest.approx(2.5)
    assert tasks["0 synchronous"]["tokens_per_second"] == pytest.approx(30.0)


BROKEN = [
    ("{", "not JSON"),
    ("[1, 2]", "not a result file"),
    ('{"a": 1}', "not a result file"),
    ("[" * 100_000, "not JSON that can be read"),
    ({**vllm(), "ttfts": [0.1]}, "not whole"),
    ({**vllm(), "ttfts": [-1.0] * 8}, "ttfts.0"),
    ({**vllm(), "duration": "soon"}, "duration"),
    ('{"duration": NaN, "completed": 1, "total_input_tokens": 1, "total_output_tokens": 1}', "duration"),
    ({"benchmarks": []}, "benchmarks"),
    ({"benchmarks": [{"requests": {"successful": [{"output_tokens": -3}]}}]}, "output_tokens"),
]


@pytest.mark.parametrize(("content", "words"), BROKEN)
def test_broken_files_are_refused_in_a_sentence(content: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_results(written(tmp_path / "r.json", content))
    assert "\n" not in str(caught.value)


def test_unknown_units_impossible_counts_and_large_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.jsonl"
    with pytest.raises(ConfigError, match="fortnights"):
        read_results(written(path, aiperf().replace('"sec"', '"fortnights"')))
    with pytest.raises(ConfigError, match="more accepted"):
        read_results(written(path, aiperf().replace('_draft_tokens": 6', '_draft_tokens": 60')))
    monkeypatch.setattr(importers, "MAX_BYTES", 100)
    with pytest.raises(ConfigError, match="larger than"):
        read_results(path)


def test_imported_runs_are_records_like_ours(tmp_path: Path) -> None:
    path = written(tmp_path / "r.json", vllm())
    with Store(tmp_path / "a.db") as db:
        run, found = import_run(db, path, "theirs")
        back = [Record.from_dict(d) for d in db.records(run).values()]
        assert back == found.records
        assert db.run("theirs").kind == "import" and db.run("theirs").state == "done"
        rows = tables.table(db, "theirs")
    assert len(rows) == 8 and rows[-1]["failed"] == 1 and rows[0]["tokens"] == 5


def test_latencies_are_compared_and_the_same_run_is_no_different(tmp_path: Path) -> None:
    base = read_results(written(tmp_path / "a.json", vllm())).records
    slow = read_results(written(tmp_path / "b.json", vllm(scale=3.0))).records
    for d in differences(slow, base):
        assert d.value == pytest.approx(3.0) and d.low > 1.5
    assert all(d.low < 1 < d.high and d.value == 1 for d in differences(base, base) if d.what != "per token")
    assert not differences([], base)


def test_the_command_reads_shows_compares_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["outrider", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), "".join(capsys.readouterr())

    store, out = ("--store", tmp_path / "a.db"), tmp_path / "deep" / "run"
    for name, scale in (("base", 1.0), ("slow", 2.0)):
        code, text = run("runs", "import", written(tmp_path / f"{name}.json", vllm(scale=scale)), *store, "--json")
        assert code == 0 and json.loads(text)["records"] == 8
    code, text = run("runs", "compare", "slow", "base", *store, "--json")
    assert code == 0 and json.loads(text)["latency"][0]["value"] == pytest.approx(2.0)
    assert "vllm" in run("runs", "show", "slow", *store)[1]
    assert run("runs", "export", "slow", *store, "--out", out.with_suffix(".csv"))[0] == 0
    with out.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and json.loads(rows[0]["timings"])[0]["tokens"] == 5
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run("runs", "export", "slow", *store, "--out", out.with_suffix(".parquet"))[0] == 0
    table = parquet.read_table(out.with_suffix(".parquet")).to_pylist()
    assert [r["item"] for r in table] == list(range(8)) and table[0]["name"] == "slow"
    assert {k: str(v) for k, v in table[0].items() if v is not None} == {k: v for k, v in rows[0].items() if v}
    assert run("runs", "export", "slow", *store, "--format", "parquet")[0] == 2
    assert run("runs", "export", "slow", *store, "--out", "x.xls")[0] == 2
    assert run("runs", "import", tmp_path / "none.json", *store)[0] == 2
    assert run("gate", "slow", "base", *store)[0] == 2
