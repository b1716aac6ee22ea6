"""What engines say of themselves: for each of them, which of its metrics is which of our sums.

Read in the sources of vLLM 0.32 and 0.33, SGLang 0.5.23 and llama.cpp (November 2026), and on pages that the first and the last
served. A *pass* is one sequence's part of a forward of the target that gave it at least one token: plain decoding needs one for
every token, so tokens per pass are what speculation is worth before its costs.

A reader makes flat sums of a page, all of which only grow while a server lives:

    emitted, passes, proposed, accepted, rejected, judged, risk, spread, bias    as in `records.Counts`
    drafts    passes with a draft
    accepted_at/D, judged_at/D    by position in the draft, from 0
    ended/REASON, failed, overloaded, prompt    requests and tokens
    seconds/PHASE, cpu    seconds
    evidence/NAME    judged, rejected, risk, spread of requests without a seed of their own: what an interval may be formed of
    first/LE, per_token/LE    observations of the bucket up to LE seconds
"""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.integrations.watch.page import Page

Sums = dict[str, float]


@dataclass(frozen=True, slots=True)
class Seen:
    """One page as its flavour reads it. gauges: values of the moment. how: from which metrics the passes were formed."""

    flavour: str
    model: str | None
    sums: Sums
    gauges: dict[str, float] = field(default_factory=dict)
    how: str = ""


def _given(**found: float | None) -> dict[str, float]:
    return {name: value for name, value in found.items() if value is not None}


def _indexed(prefix: str, found: dict[str, float]) -> Sums:
    return {
        f"{prefix}/{key}": value for key, value in found.items() if key.isascii() and key.isdigit() and len(key) < 4
    }


def _buckets(page: Page, name: str, prefix: str) -> Sums:
    """Observations of each bucket by itself."""
    ends: list[tuple[float, float]] = []
    for end, value in page.by(f"{name}_bucket", "le").items():
        try:
            ends.append((float(end), value))
        except ValueError:
            continue
    below, out = 0.0, Sums()
    for end, value in sorted(ends):
        out[f"{prefix}/{end:g}"] = max(0.0, value - below)
        below = value
    return out


def _reasons(found: dict[str, float]) -> Sums:
    return {f"ended/{reason[:20]}": value for reason, value in list(found.items())[:20] if reason}


def _born(page: Page) -> dict[str, float]:
    """When the process began. What it uses is told of our own alone: others have their engines in further processes."""
    return _given(start=max((s.value for s in page.samples.get("process_start_time_seconds", ())), default=None))


def _model(page: Page, *names: str) -> str | None:
    """The served names that a page's labels say."""
    for name in names:
        if found := page.values(name, "model_name"):
            return ", ".join(found[:4])
    return None


# ------------------------------------------------------------------ Outrider's own, in our server and in others
_S = "outrider_spec_decode_"
EVIDENCE = {
    "judged": "judged_tokens",
    "rejected": "rejections",
    "risk": "predicted_rejections",
    "spread": "rejection_variance",
}
"""The sums of requests without a seed of their own, and their names behind `outrider_evidence_`."""
OWN = (
    *(f"outrider_evidence_{n}_total" for n in EVIDENCE.values()),
    *(
        f"{_S}{n}_total"
        for n in ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "rejections", "judged_tokens")
    ),
    *(f"{_S}{n}_total" for n in ("predicted_rejections", "rejection_variance", "bias", "accepted_tokens_per_position")),
    f"{_S}length",
    f"{_S}speedup_ratio_estimate",
    f"{_S}break_even_rejection_probability",
    "outrider_exactness_log_evalue",
    "outrider_residual_log_detector",
)


LEDGER = ("evidence", "rejected", "judged", "risk", "spread", "bias", "judged_at", "accepted_at")
"""What our plug-in knows better than the engine that it is in."""


def own(page: Page) -> tuple[Sums, dict[str, float]]:
    """The sums and values that only Outrider exports: the ledger above all, from our server or from our plug-in in another one."""
    sums = _given(
        drafts=page.total(f"{_S}num_drafts_total"),
        proposed=page.total(f"{_S}num_draft_tokens_total"),
        accepted=page.total(f"{_S}num_accepted_tokens_total"),
        rejected=page.total(f"{_S}rejections_total"),
        judged=page.total(f"{_S}judged_tokens_total"),
        risk=page.total(f"{_S}predicted_rejections_total"),
        spread=page.total(f"{_S}rejection_variance_total"),
        bias=page.total(f"{_S}bias_total"),
    )
    sums |= _given(**{f"evidence/{k}": page.total(f"outrider_evidence_{n}_total") for k, n in EVIDENCE.items()})
    sums |= _indexed("judged_at", page.by(f"{_S}judged_tokens_total", "position"))
    sums |= _indexed("accepted_at", page.by(f"{_S}accepted_tokens_per_position_total", "position"))
    gauges = _given(
        length=page.total(f"{_S}length"),
        speedup=page.total(f"{_S}speedup_ratio_estimate"),
        break_even=page.total(f"{_S}break_even_rejection_probability"),
        evidence=page.total("outrider_exactness_log_evalue"),
        detector=page.total("outrider_residual_log_detector"),
    )
    return sums, gauges


def outrider(page: Page) -> Seen:
    """Our own server."""
    sums, gauges = own(page)
    sums |= _given(
        cpu=page.total("process_cpu_seconds_total"),
        emitted=page.total("outrider_tokens_total"),
        passes=page.total("outrider_sequence_steps_total"),
        steps=page.total("outrider_steps_total"),
        prompt=page.total("vllm:prompt_tokens_total"),
        overloaded=page.by("outrider_requests_refused_total", "reason").get("Overloaded"),
        failed=(page.total("outrider_requests_failed_total") or 0.0)
        + page.by("outrider_http_responses_total", "code").get("500", 0.0),
    )
    sums |= {f"seconds/{phase}": s for phase, s in page.by("outrider_phase_seconds_total", "phase").items()}
    sums |= _reasons(page.by("vllm:request_success_total", "finished_reason"))
    sums |= _buckets(page, "vllm:time_to_first_token_seconds", "first")
    sums |= _buckets(page, "vllm:request_time_per_output_token_seconds", "per_token")
    gauges |= _born(page) | _given(
        memory=page.total("process_resident_memory_bytes"),
        running=page.total("vllm:num_requests_running"),
        waiting=page.total("vllm:num_requests_waiting"),
        kv=page.total("outrider_kv_cache_usage_ratio"),
        alive=page.total("outrider_engine_alive"),
    )
    return Seen("Outrider", _model(page, "outrider_tokens_total"), sums, gauges, "outrider_sequence_steps_total")


# ------------------------------------------------------------------ vLLM
def vllm(page: Page) -> Seen:
    """vLLM. Its histograms of times hold one observation for every pass: the first token's, and one for each later output.

    Where they are missing, every pass gives one token that was not drafted; an accepted draft behind the end of a text makes that a
    little too few.
    """
    emitted, accepted = (
        page.total("vllm:generation_tokens_total"),
        page.total("vllm:spec_decode_num_accepted_tokens_total"),
    )
    first = page.total("vllm:time_to_first_token_seconds_count")
    later = page.total("vllm:inter_token_latency_seconds_count")
    later = page.total("vllm:time_per_output_token_seconds_count") if later is None else later
    passes, how = None, ""
    if first is not None and later is not None:
        passes, how = (
            first + later,
            "observations of vllm:time_to_first_token_seconds and vllm:inter_token_latency_seconds",
        )
    elif emitted is not None:
        passes = max(0.0, emitted - (accepted or 0.0))
        how = "generated minus accepted tokens: texts that end within a draft make it a little too small"
    sums = _given(
        emitted=emitted,
        passes=passes,
        drafts=page.total("vllm:spec_decode_num_drafts_total"),
        proposed=page.total("vllm:spec_decode_num_draft_tokens_total"),
        accepted=accepted,
        prompt=page.total("vllm:prompt_tokens_total"),
        overloaded=page.total("vllm:admission_rejections_total"),
    )
    sums |= _indexed("accepted_at", page.by("vllm:spec_decode_num_accepted_tokens_per_pos_total", "position"))
    ended = page.by("vllm:request_success_total", "finished_reason")
    sums |= _reasons(ended)
    sums["failed"] = ended.get("error", 0.0) + page.by("http_requests_total", "status").get("5xx", 0.0)
    sums |= _buckets(page, "vllm:time_to_first_token_seconds", "first")
    sums |= _buckets(page, "vllm:request_time_per_output_token_seconds", "per_token")
    gauges = _born(page) | _given(
        running=page.total("vllm:num_requests_running"),
        waiting=page.total("vllm:num_requests_waiting"),
        kv=page.total("vllm:kv_cache_usage_perc"),
    )
    ours, more = own(page)
    named = _model(page, "vllm:generation_tokens_total", "vllm:num_requests_running")
    if not ours:
        return Seen("vLLM", named, sums, gauges, how)
    if not ours.get("judged"):  # the plug-in counts no verdicts, or there were none yet: its zeros say nothing
        return Seen("vLLM with Outrider's plug-in", named, sums, gauges, how)
    ledger = {k: v for k, v in ours.items() if k.partition("/")[0] in LEDGER}
    return Seen("vLLM with Outrider's plug-in", named, sums | ledger, gauges | more, how)


# ------------------------------------------------------------------ SGLang
def sglang(page: Page) -> Seen:
    """SGLang. Tokens, requests and verifications are all added when a request ends. The prompt's forward gives its first token, and
    every verification its accepted tokens and one more; without speculation a pass is a token."""
    emitted, requests = page.total("sglang:generation_tokens_total"), page.total("sglang:num_requests_total")
    verified = page.total("sglang:spec_verify_calls_total")
    passes, how = emitted, "generated tokens: it does not speculate"
    if emitted is not None and requests is not None and verified is not None:
        passes, how = min(emitted, requests + verified), "sglang:num_requests_total and sglang:spec_verify_calls_total"
    accepted = None if verified is None or emitted is None or passes is None else emitted - passes
    sums = _given(
        emitted=emitted,
        passes=passes,
        drafts=verified,
        accepted=accepted,
        prompt=page.total("sglang:prompt_tokens_total"),
        failed=page.total("sglang:num_aborted_requests_total"),
    )
    sums |= _given(**{"ended/requests": requests})
    sums |= _buckets(page, "sglang:time_to_first_token_seconds", "first")
    sums |= _buckets(page, "sglang:inter_token_latency_seconds", "per_token")
    gauges = _born(page) | _given(
        running=page.total("sglang:num_running_reqs", priority=""),
        waiting=page.total("sglang:num_queue_reqs", priority=""),
        kv=max((s.value for s in page.samples.get("sglang:token_usage", ())), default=None),
        length=max((s.value for s in page.samples.get("sglang:spec_num_steps", ())), default=None),
        reported=max((s.value for s in page.samples.get("sglang:spec_accept_length", ())), default=None),
    )
    return Seen("SGLang", _model(page, "sglang:generation_tokens_total", "sglang:num_running_reqs"), sums, gauges, how)


# ------------------------------------------------------------------ llama.cpp
def llamacpp(page: Page) -> Seen:
    """llama.cpp's server. Sums are added when a request ends; every pass gives one token that was not drafted."""
    emitted, accepted = (
        page.total(f"llamacpp:{n}_total") for n in ("tokens_predicted", "spec_decode_num_accepted_tokens")
    )
    sums = _given(
        emitted=emitted,
        passes=None if emitted is None else max(0.0, emitted - (accepted or 0.0)),
        drafts=page.total("llamacpp:spec_decode_num_drafts_total"),
        proposed=page.total("llamacpp:spec_decode_num_draft_tokens_total"),
        accepted=accepted,
        prompt=page.total("llamacpp:prompt_tokens_total"),
        generating=page.total("llamacpp:tokens_predicted_seconds_total"),
    )
    sums |= _indexed("accepted_at", page.by("llamacpp:spec_decode_num_accepted_tokens_per_pos_total", "position"))
    gauges = _given(
        running=page.total("llamacpp:requests_processing"), waiting=page.total("llamacpp:requests_deferred")
    )
    return Seen(
        "llama.cpp", _model(page, "llamacpp:tokens_predicted_total"), sums, gauges, "generated minus accepted tokens"
    )
