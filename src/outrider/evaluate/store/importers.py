"""Result files of other benchmark tools, read into a store beside our own runs.

    vllm      the JSON of `vllm bench serve --save-result`; one record per request with `--save-detailed`
    aiperf    `profile_export.jsonl` (one record per request) or `profile_export_aiperf.json` (figures of the run only)
    guidellm  `benchmarks.json`; every benchmark of a sweep is a task of its own

Times become seconds and every request a record as `bench` writes it. What a file does not say stays empty and is never made up:
engines that report no rejections have no ledger, requests that failed are outcomes without a time.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from outrider.errors import ConfigError
from outrider.evaluate.records import Record, Timing, latency
from outrider.evaluate.store.store import Store
from outrider.files import json_rows, parse_json, read_text
from outrider.records import Counts

FORMATS = ("vllm", "aiperf", "guidellm")
MAX_BYTES = 1 << 28
MAX_REQUESTS = 1_000_000
Seconds = Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Text = Annotated[str, Field(max_length=2000)]


class _Part(BaseModel):
    """What is read of an object; fields we do not use may be anything."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


@dataclass(slots=True)
class Imported:
    """One file as a run: records (arm = task, group = number of the request), and what the file says of the whole run."""

    kind: str
    records: list[Record] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    reported: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def add(self, task: str, number: int, tokens: int, first: float | None, end: float | None, counts: Counts) -> None:
        """One request; end None: it failed."""
        failed = end is None
        timing = () if failed else (Timing(end if first is None else first, end, tokens),)
        self.records.append(
            Record(task, number, 0, 0, 0 if failed else tokens, end or 0.0, {}, counts, int(failed), timing)
        )

    def summary(self) -> dict[str, Any]:
        """Figures by task: from the records, over the run's own duration, since requests of a run overlap in time."""
        tasks = {}
        for task in dict.fromkeys(r.arm for r in self.records):
            mine = [r for r in self.records if r.arm == task]
            tokens, took = sum(r.tokens for r in mine), self.seconds.get(task)
            counts = Counts()
            for r in mine:
                counts.merge(r.counts)
            tasks[task] = {
                "requests": len(mine),
                "failed": sum(r.failed for r in mine),
                "tokens": tokens,
                "seconds": took,
                "tokens_per_second": tokens / took if took else None,
                "acceptance_length": counts.tokens / counts.steps if counts.steps else None,
                "draft_acceptance_rate": counts.accepted / counts.proposed if counts.proposed else None,
                "latency": latency([r for r in mine if not r.failed]),
            }
        return {"format": self.kind, "tasks": tasks, "reported": self.reported, "note": self.note}


def read_results(path: Path, kind: str = "auto") -> Imported:
    """A result file. Raises ConfigError for a file that is too large, is not in the format, or breaks its rules."""
    if kind not in ("auto", *FORMATS):
        raise ConfigError(f"result files are of {', '.join(FORMATS)}, not {kind!r}")
    try:
        document = _parse(path)
        found = _guess(document) if kind == "auto" else kind
        if found is None:
            raise ConfigError(f"{path}: not a result file of {', '.join(FORMATS)}")
        read = {"vllm": _vllm, "aiperf": _aiperf, "guidellm": _guidellm}[found]
        out = read(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(x) for x in first["loc"])
        raise ConfigError(f"{path}: {where or 'document'}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({str(error)[:200] or 'too deeply nested'})") from None
    if len(out.records) > MAX_REQUESTS:
        raise ConfigError(f"{path}: more than {MAX_REQUESTS} requests; import its parts")
    return out


def import_run(store: Store, path: Path, name: str, kind: str = "auto") -> tuple[str, Imported]:
    """Read a file into a store; the run's id and what was read. An interrupted import goes on when it is repeated."""
    found = read_results(path, kind)
    run = store.begin("import", name, {"format": found.kind, "file": path.name, **found.config})
    for record in found.records:
        store.append(run, record.key, asdict(record))
    store.finish(run, found.summary())
    return run, found


def _parse(path: Path) -> Any:
    """A JSON document, or a list of them for JSON lines. NaN and Infinity are refused where a number is read."""
    text = read_text(path, MAX_BYTES)
    if path.suffix == ".jsonl":
        return [row for _, row in json_rows(text, path)]
    return parse_json(text, path)


def _guess(document: Any) -> str | None:
    if isinstance(document, list):
        return "aiperf" if document and isinstance(document[0], dict) and "metadata" in document[0] else None
    if not isinstance(document, dict):
        return None
    if isinstance(document.get("benchmarks"), list):
        return "guidellm"
    if "aiperf_version" in document or isinstance(document.get("request_latency"), dict):
        return "aiperf"
    return "vllm" if "duration" in document and "completed" in document else None


# ------------------------------------------------------------------ vLLM
class _Vllm(_Part):
    duration: Seconds
    completed: Count
    failed: Count | None = None
    total_input_tokens: Count
    total_output_tokens: Count
    model_id: Text | None = None
    backend: Text | None = None
    date: Text | None = None
    request_rate: Seconds | Text | None = None
    max_concurrency: Count | None = None
    input_lens: list[Count] | None = Field(default=None, max_length=MAX_REQUESTS)
    output_lens: list[Count] | None = Field(default=None, max_length=MAX_REQUESTS)
    ttfts: list[Seconds] | None = Field(default=None, max_length=MAX_REQUESTS)
    itls: list[list[Seconds]] | None = Field(default=None, max_length=MAX_REQUESTS)
    errors: list[str | None] | None = Field(default=None, max_length=MAX_REQUESTS)


def _vllm(document: Any) -> Imported:
    v = TypeAdapter(_Vllm).validate_python(document)
    config = {k: getattr(v, k) for k in ("model_id", "backend", "date", "max_concurrency")}
    config["request_rate"] = None if v.request_rate is None else str(v.request_rate)
    out = Imported("vllm", config=config, seconds={"vllm": v.duration})
    out.reported = _numbers(document)
    lists = (v.output_lens, v.ttfts, v.itls)
    if any(x is None for x in lists):
        out.note = "figures of the run only: `vllm bench serve --save-detailed` writes one entry per request"
        return out
    sizes = {len(x) for x in (*lists, v.input_lens, v.errors) if x is not None}
    if len(sizes) != 1:
        raise ConfigError(f"the lists of requests have {min(sizes)} to {max(sizes)} entries: the file is not whole")
    errors = v.errors or [""] * len(v.output_lens or ())
    for i, (tokens, first, gaps, error) in enumerate(
        zip(v.output_lens or (), v.ttfts or (), v.itls or (), errors, strict=True)
    ):
        good = not error and tokens > 0
        out.add("vllm", i, tokens, first if good else None, first + math.fsum(gaps) if good else None, Counts())
    return out


def _numbers(document: dict[str, Any]) -> dict[str, float]:
    """The plain numbers a document has at its top: kept as the tool reports them, under its own names."""
    return {
        str(k)[:100]: v
        for k, v in list(document.items())[:500]
        if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
    }


# ------------------------------------------------------------------ acceptance, as vLLM reports it for a request
class _Acceptance(_Part):
    num_spec_steps: Count
    num_draft_tokens: Count
    num_accepted_draft_tokens: Count


def _acceptance(found: _Acceptance | None) -> Counts:
    if found is None:
        return Counts()
    if found.num_accepted_draft_tokens > found.num_draft_tokens:
        raise ValueError("a request has more accepted than proposed drafts")
    return Counts(steps=found.num_spec_steps, proposed=found.num_draft_tokens, accepted=found.num_accepted_draft_tokens)


# ------------------------------------------------------------------ AIPerf
class _Metric(_Part):
    value: Annotated[float, Field(allow_inf_nan=False)] | list[float]
    unit: Text


class _Metadata(_Part):
    request_start_ns: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    request_end_ns: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    benchmark_phase: Text = "profiling"
    was_cancelled: bool = False


class _AiperfRow(_Part):
    metadata: _Metadata
    metrics: dict[str, Any] = Field(default_factory=dict, max_length=1000)
    error: dict[str, Any] | None = None
    spec_decode_acceptance: _Acceptance | None = None


UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0, "seconds": 1.0}


def _aiperf(document: Any) -> Imported:
    out = Imported("aiperf")
    if isinstance(document, dict):
        out.reported = {
            str(k)[:100]: {"unit": v.get("unit"), "avg": v.get("avg"), "p50": v.get("p50"), "p99": v.get("p99")}
            for k, v in list(document.items())[:500]
            if isinstance(v, dict) and "unit" in v and "avg" in v
        }
        if not out.reported:
            raise ConfigError("no metric with `unit` and `avg` in it: is it profile_export_aiperf.json?")
        out.note = "figures of the run only: import profile_export.jsonl for one record per request"
        return out
    rows = TypeAdapter(list[_AiperfRow]).validate_python(document)
    rows = [r for r in rows if r.metadata.benchmark_phase == "profiling"]
    for i, row in enumerate(rows):
        bad = row.error is not None or row.metadata.was_cancelled
        end = None if bad else _time(row, "request_latency")
        first = None if bad else _time(row, "time_to_first_token")
        tokens = _value(row, "output_sequence_length") or _value(row, "output_token_count") or 0.0
        out.add("aiperf", i, int(tokens), first, end, _acceptance(row.spec_decode_acceptance))
    starts = [r.metadata.request_start_ns for r in rows if r.metadata.request_start_ns is not None]
    ends = [r.metadata.request_end_ns for r in rows if r.metadata.request_end_ns is not None]
    if starts and ends:
        out.seconds["aiperf"] = max(0.0, (max(ends) - min(starts)) / 1e9)
    return out


def _metric(row: _AiperfRow, name: str) -> _Metric | None:
    return None if name not in row.metrics else TypeAdapter(_Metric).validate_python(row.metrics[name])


def _value(row: _AiperfRow, name: str) -> float | None:
    found = _metric(row, name)
    return None if found is None or isinstance(found.value, list) else found.value


def _time(row: _AiperfRow, name: str) -> float | None:
    found = _metric(row, name)
    if found is None or isinstance(found.value, list):
        return None
    if found.unit not in UNITS:
        raise ConfigError(f"{name} is in {found.unit!r}; known units of time: {', '.join(UNITS)}")
    return TypeAdapter(Seconds).validate_python(found.value * UNITS[found.unit])


# ------------------------------------------------------------------ guidellm
class _GuideSpeculation(_Part):
    speculative_decoding: _Acceptance | None = None


class _GuideRequest(_Part):
    output_tokens: Count | None = None
    request_latency: Seconds | None = None
    time_to_first_token_ms: Annotated[float, Field(ge=0, le=1e10, allow_inf_nan=False)] | None = None
    response_metrics: _GuideSpeculation | None = None


class _GuideRequests(_Part):
    successful: list[_GuideRequest] = Field(default_factory=list, max_length=MAX_REQUESTS)
    errored: list[_GuideRequest] | None = Field(default=None, max_length=MAX_REQUESTS)


class _GuideBenchmark(_Part):
    requests: _GuideRequests
    config: dict[str, Any] | None = None
    args: dict[str, Any] | None = None
    duration: Seconds | None = None


class _Guide(_Part):
    benchmarks: list[_GuideBenchmark] = Field(min_length=1, max_length=1000)


def _guidellm(document: Any) -> Imported:
    """Incomplete requests (cut off when a benchmark ended) are neither a success nor a failure and are left out."""
    out = Imported("guidellm")
    for b, benchmark in enumerate(TypeAdapter(_Guide).validate_python(document).benchmarks):
        strategy = (benchmark.config or benchmark.args or {}).get("strategy")
        kind = strategy.get("type_", "benchmark") if isinstance(strategy, dict) else "benchmark"
        task = f"{b} {str(kind)[:40]}"
        good = benchmark.requests.successful
        for i, r in enumerate(good):
            first = None if r.time_to_first_token_ms is None else r.time_to_first_token_ms / 1e3
            spec = None if r.response_metrics is None else r.response_metrics.speculative_decoding
            out.add(task, i, r.output_tokens or 0, first, r.request_latency, _acceptance(spec))
        for i in range(len(benchmark.requests.errored or ())):
            out.add(task, len(good) + i, 0, None, None, Counts())
        if benchmark.duration is not None:
            out.seconds[task] = benchmark.duration
    return out
