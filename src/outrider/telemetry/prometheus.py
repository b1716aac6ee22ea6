"""Prometheus metrics: vLLM's names for vLLM's metrics, so that its dashboards and benchmark clients work, and our own besides.

All are sums of raw counts; readers form ratios. Labels come from closed sets: model, phase, position, reason, route. No text and no
request name of a client is ever a label.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from outrider.errors import ConfigError
from outrider.records import PHASES, Counts, StepRecord
from outrider.telemetry.detect import Residuals
from outrider.telemetry.ledger import ledger

try:
    from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        InfoMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ConfigError("metrics need prometheus-client: pip install 'outrider[serve]'") from error

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Bucket ends for latencies of requests."""
TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Bucket ends for seconds per token: finer than usual, since speculation moves them by tens of per cent."""
REFUSALS = ("BadField", "Overloaded", "RequestError", "Unavailable")
"""Reasons for which requests are refused."""
COUNTS = tuple(float(d * 10**e) for e in range(6) for d in (1, 2, 5))
"""Bucket ends for numbers of tokens: 1, 2, 5, 10 ..."""
LENGTHS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0)
"""Bucket ends for acceptance lengths of requests."""


class Histogram:
    """Counts of values by bucket. bounds: ascending upper ends; larger values count in the last, open bucket."""

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts, as Prometheus expects them."""
        out: list[tuple[str, float]] = []
        below = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            out.append((bound, below))
        return out


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """The value that a `share` of the counted ones do not exceed, linear within its bucket as in Prometheus; the largest bound for
    the open bucket, None if nothing was counted."""
    left = share * sum(counts)
    if not any(counts):
        return None
    for low, high, count in zip((0.0, *bounds), bounds, counts, strict=False):
        if count and left <= count:
            return low + (high - low) * left / count
        left -= count
    return bounds[-1]


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that ended. Seconds since it arrived; `first` is None if it never got a token, `queued` (until it had a slot) if it
    never got one. outcome: a finish reason."""

    outcome: str
    prompt_tokens: int
    tokens: int
    first: float | None
    total: float
    counts: Counts
    queued: float | None = None
    longest: int = 0


@dataclass(slots=True, eq=False)
class Metrics(Collector):
    """A sink of step records and of finished requests, and the text that Prometheus reads.

    model: the served name. info: labels of the configuration (drafter, rule, ...). The sums are written by the engine thread
    and the request metrics by the event loop; each number has one writer, so reading needs no lock. evidence: the sums of the
    sequences whose seed the engine chose, residuals: what they say about exactness; requests with seeds of their own may repeat
    one another's noise, and count in neither. gauges, counters: further values by name (without `outrider_`), with their help
    text. alerts: name and state of every built-in alert.
    """

    model: str
    info: dict[str, str] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    evidence: Counts = field(default_factory=Counts)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    steps: int = 0
    rows: int = 0
    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    responses: Counter[tuple[str, str]] = field(default_factory=Counter)
    first_token: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    per_token: Histogram = field(default_factory=lambda: Histogram(TOKEN_SECONDS))
    whole: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    queued: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    interval: Histogram = field(default_factory=lambda: Histogram(TOKEN_SECONDS))
    prefill: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    decode: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    inference: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    prompt_lengths: Histogram = field(default_factory=lambda: Histogram(COUNTS))
    output_lengths: Histogram = field(default_factory=lambda: Histogram(COUNTS))
    longest_lengths: Histogram = field(default_factory=lambda: Histogram(COUNTS))
    kv_usage: Callable[[], float] = float
    lengths: Histogram = field(default_factory=lambda: Histogram(LENGTHS))
    residuals: Residuals = field(default_factory=Residuals)
    gauges: dict[str, tuple[str, Callable[[], float | None]]] = field(default_factory=dict)
    counters: dict[str, tuple[str, Callable[[], float | None]]] = field(default_factory=dict)
    alerts: Callable[[], Iterable[tuple[str, bool]]] = tuple

    def __call__(self, record: StepRecord) -> None:
        """One step of the engine."""
        self.steps += 1
        self.rows += record.rows
        self.running, self.waiting = record.running, record.waiting
        for phase, value in record.seconds.items():
            self.seconds[phase] += value
        self.counts.merge(record.counts)
        self.evidence.merge(record.engine_seeded)
        self.residuals.add(record.engine_seeded)

    def finished(self, request: Finished) -> None:
        """Count a request that ended. A failed one counts as an outcome only: its times are in no histogram."""
        self.outcomes[request.outcome] += 1
        self.prompt_tokens += request.prompt_tokens
        if request.outcome not in ("stop", "length"):
            return
        self.whole.observe(request.total)
        if request.first is not None:
            self.first_token.observe(request.first)
            if request.tokens > 1:
                self.per_token.observe((request.total - request.first) / (request.tokens - 1))
            self.decode.observe(request.total - request.first)
            if request.queued is not None:
                self.prefill.observe(max(0.0, request.first - request.queued))
                self.inference.observe(request.total - request.queued)
        self.prompt_lengths.observe(request.prompt_tokens)
        self.output_lengths.observe(request.tokens)
        self.longest_lengths.observe(request.longest or request.tokens)
        if request.counts.steps:
            self.lengths.observe(request.counts.tokens / request.counts.steps)

    def text(self) -> bytes:
        """The exposition (text format 0.0.4)."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        ProcessCollector(registry=registry)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """All families: vLLM's, then ours."""
        yield from self._like_vllm()
        yield from self.ours()

    def ours(self) -> Iterator[Metric]:
        """Our own families alone, for a process whose other metrics are vLLM's."""
        yield from self._speculation()
        yield from self._server()

    # ------------------------------------------------------------------ families
    def _like_vllm(self) -> Iterator[Metric]:
        names, values = ["model_name", "engine"], [self.model, "0"]
        c = self.counts
        for name, text, value in (
            ("vllm:spec_decode_num_drafts", "Sequence-steps that judged a draft.", drafts(c)),
            ("vllm:spec_decode_num_draft_tokens", "Draft tokens proposed.", c.proposed),
            ("vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted.", c.accepted),
            ("vllm:prompt_tokens", "Prompt tokens of finished requests.", self.prompt_tokens),
            ("vllm:generation_tokens", "Tokens emitted.", c.emitted),
        ):
            yield _counter(name, text, names, [(values, value)])
        positions = [([*values, str(d)], n) for d, n in enumerate(c.accepted_at)]
        yield _counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted, by position.", [*names, "position"], positions
        )
        yield _counter(
            "vllm:request_success",
            "Finished requests.",
            [*names, "finished_reason"],
            [([*values, reason], self.outcomes[reason]) for reason in ("stop", "length", "abort", "error")],
        )
        for name, value in (("running", self.running), ("waiting", self.waiting)):
            yield _gauge(f"vllm:num_requests_{name}", f"Sequences {name}.", names, values, value)
        yield _gauge(
            "vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", names, values, self.kv_usage()
        )
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token.", self.first_token),
            ("request_time_per_output_token_seconds", "Mean seconds per token after the first.", self.per_token),
            ("e2e_request_latency_seconds", "Arrival to last token.", self.whole),
            ("request_queue_time_seconds", "Arrival to a slot.", self.queued),
            ("inter_token_latency_seconds", "Between two deliveries of tokens, spread over them.", self.interval),
            ("request_prefill_time_seconds", "A slot to first token.", self.prefill),
            ("request_decode_time_seconds", "First token to last.", self.decode),
            ("request_inference_time_seconds", "A slot to last token.", self.inference),
            ("request_prompt_tokens", "Prompt tokens of a request.", self.prompt_lengths),
            ("request_generation_tokens", "Tokens that a request got.", self.output_lengths),
            (
                "request_max_num_generation_tokens",
                "Tokens that the longest sample of a request got.",
                self.longest_lengths,
            ),
        ):
            yield _histogram(f"vllm:{name}", text, names, values, histogram)

    def _speculation(self) -> Iterator[Metric]:
        names, values, c = ["model_name"], [self.model], self.counts
        for name, text, value in (
            ("num_drafts", "Sequence-steps that judged a draft.", drafts(c)),
            ("num_draft_tokens", "Draft tokens proposed.", c.proposed),
            ("num_accepted_tokens", "Draft tokens accepted.", c.accepted),
            ("rejections", "Draft tokens rejected.", c.rejected),
            (
                "predicted_rejections",
                "Sum of each rule's own rejection probability before its coin (the ledger).",
                c.risk,
            ),
            ("rejection_variance", "Predictable variance of rejections minus predicted rejections.", c.spread),
            ("bias", "Total variation spent by a lossy rule.", c.bias),
        ):
            yield _counter(f"outrider_spec_decode_{name}", text, names, [(values, value)])
        for name, text, by_depth in (
            ("judged_tokens", "Draft positions whose coin was tossed.", c.judged_at),
            ("accepted_tokens_per_position", "Draft tokens accepted, by position.", c.accepted_at),
        ):
            samples = [([self.model, str(d)], n) for d, n in enumerate(by_depth)]
            yield _counter(f"outrider_spec_decode_{name}", text, ["model_name", "position"], samples)
        yield from self._ledger()
        yield _histogram(
            "outrider_request_acceptance_length", "Tokens per step of a request.", names, values, self.lengths
        )

    def _ledger(self) -> Iterator[Metric]:
        """Of the evidence alone: its sums, and between which numbers its rejections lie in an exact engine."""
        names, values, e = ["model_name"], [self.model], self.evidence
        whose = "of requests without a seed of their own"
        for name, text, value in (
            ("judged_tokens", "Draft positions whose coin was tossed", e.judged),
            ("rejections", "Draft tokens rejected", e.rejected),
            ("predicted_rejections", "Predicted rejections", e.risk),
            ("rejection_variance", "Predictable variance of rejections minus predicted rejections", e.spread),
        ):
            yield _counter(f"outrider_evidence_{name}", f"{text}, {whose}.", names, [(values, value)])
        book = ledger(e)
        for name, text, value in (
            ("low", "Lowest number of evidence_rejections that agrees with the prediction (99%).", book.low),
            ("high", "Highest number of evidence_rejections that agrees with the prediction (99%).", book.high),
        ):
            yield _gauge(f"outrider_spec_decode_ledger_{name}", text, names, values, value)

    def _server(self) -> Iterator[Metric]:
        names, values = ["model_name"], [self.model]
        phases = [([self.model, phase], self.seconds[phase]) for phase in PHASES]
        yield _counter("outrider_phase_seconds", "Seconds of steps, by phase.", ["model_name", "phase"], phases)
        for name, text, value in (
            ("steps", "Steps of the engine.", self.steps),
            ("sequence_steps", "Verdicts.", self.counts.steps),
            ("rows", "Rows scored by the target.", self.rows),
            ("tokens", "Tokens emitted.", self.counts.emitted),
        ):
            yield _counter(f"outrider_{name}", text, names, [(values, value)])
        reasons = dict.fromkeys(REFUSALS, 0) | self.refused  # from 0: the first refusal is a rise too
        refused = [([self.model, reason], n) for reason, n in sorted(reasons.items())]
        yield _counter(
            "outrider_requests_refused", "Requests refused before decoding.", ["model_name", "reason"], refused
        )
        replies = [([route, code], n) for (route, code), n in sorted(self.responses.items())]
        yield _counter("outrider_http_responses", "Replies begun.", ["route", "code"], replies)
        for name, (text, read) in self.gauges.items():
            value = read()
            if value is not None:
                yield _gauge(f"outrider_{name}", text, names, values, value)
        for name, (text, read) in self.counters.items():
            value = read()
            if value is not None:
                yield _counter(f"outrider_{name}", text, names, [(values, value)])
        firing = [([self.model, name], float(on)) for name, on in self.alerts()]
        family = GaugeMetricFamily("outrider_alert_firing", "Built-in alerts.", labels=["model_name", "alert"])
        for labels, on in firing:
            family.add_metric(labels, on)
        yield family
        yield InfoMetricFamily("outrider_config", "Configuration.", value={"model_name": self.model, **self.info})


def drafts(counts: Counts) -> int:
    """Sequence-steps that judged a draft: those whose first position was judged."""
    return counts.judged_at[0] if counts.judged_at else 0


def _counter(name: str, text: str, labels: list[str], samples: Sequence[tuple[list[str], float]]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _gauge(name: str, text: str, labels: list[str], values: list[str], value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    family.add_metric(values, value)
    return family


def _histogram(name: str, text: str, labels: list[str], values: list[str], histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    family.add_metric(values, buckets=histogram.buckets(), sum_value=histogram.total)
    return family
