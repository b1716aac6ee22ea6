"""The kinds of servers that are known, told apart by the names of their metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from outrider.integrations.watch.page import Page
from outrider.integrations.watch.readers import OWN, Seen, llamacpp, outrider, sglang, vllm


@dataclass(frozen=True, slots=True)
class Flavour:
    """One kind of server. marks: a page with any of these names is its. cannot: what it never tells, for people. neutral: fields
    of a request that switch off what its defaults would do to the distribution. refuses: fields of an audit's request that it
    does not know and does not ignore. unless: names that show that it is another one after all.
    """

    name: str
    marks: tuple[str, ...]
    names: tuple[str, ...]
    read: Callable[[Page], Seen]
    cannot: tuple[str, ...]
    neutral: dict[str, float] = field(default_factory=dict)
    refuses: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()


_SHARED = (
    "process_cpu_seconds_total",
    "process_start_time_seconds",
    "process_resident_memory_bytes",
    "http_requests_total",
)
_VLLM = (
    *(
        f"vllm:{n}"
        for n in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "request_success_total")
    ),
    *(f"vllm:{n}_total" for n in ("generation_tokens", "prompt_tokens", "admission_rejections")),
    "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    *(f"vllm:spec_decode_num_{n}_total" for n in ("drafts", "draft_tokens", "accepted_tokens")),
    *(f"vllm:{n}_seconds_count" for n in ("time_to_first_token", "inter_token_latency", "time_per_output_token")),
    *(f"vllm:{n}_seconds_bucket" for n in ("time_to_first_token", "request_time_per_output_token")),
)
_NOT_TOLD = ("where a step's time goes, and what plain decoding would take", "running requests one by one")
_VARYING = "rejections, where drafts vary in length (n-gram, the end of a text): an interval is given"
FLAVOURS: tuple[Flavour, ...] = (
    Flavour(
        "Outrider",
        ("outrider_engine_alive",),
        (
            *OWN,
            *_VLLM,
            *(
                f"outrider_{n}_total"
                for n in ("tokens", "sequence_steps", "steps", "requests_refused", "requests_failed")
            ),
            *("outrider_http_responses_total", "outrider_phase_seconds_total", "outrider_kv_cache_usage_ratio"),
            "outrider_engine_alive",
        ),
        outrider,
        ("running requests and the playground, which its own page has",),
        refuses=("return_tokens_as_token_ids",),
        unless=("vllm:engine_sleep_state",),  # vLLM with our plug-in, which exports our names too
    ),
    Flavour(
        "vLLM",
        ("vllm:generation_tokens_total", "vllm:num_requests_running"),
        (*OWN, *_VLLM),
        vllm,
        (_VARYING, "predicted rejections, without Outrider's plug-in in it", *_NOT_TOLD),
        {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    ),
    Flavour(
        "SGLang",
        (
            "sglang:generation_tokens_total",
            "sglang:num_running_reqs",
            "sglang:token_usage",
            "sglang:max_total_num_tokens",
        ),
        (
            *(
                f"sglang:{n}_total"
                for n in ("generation_tokens", "prompt_tokens", "num_requests", "num_aborted_requests")
            ),
            *(
                f"sglang:{n}"
                for n in ("spec_verify_calls_total", "spec_num_steps", "spec_accept_length", "token_usage")
            ),
            *(f"sglang:{n}" for n in ("num_running_reqs", "num_queue_reqs", "max_total_num_tokens")),
            *(f"sglang:{n}_seconds_bucket" for n in ("time_to_first_token", "inter_token_latency")),
        ),
        sglang,
        ("draft tokens, rejections and positions: it counts verifications alone", "texts that still run", *_NOT_TOLD),
        {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    ),
    Flavour(
        "llama.cpp",
        ("llamacpp:tokens_predicted_total",),
        (
            *(f"llamacpp:{n}_total" for n in ("tokens_predicted", "tokens_predicted_seconds", "prompt_tokens")),
            *(f"llamacpp:spec_decode_num_{n}_total" for n in ("drafts", "draft_tokens", "accepted_tokens")),
            *("llamacpp:spec_decode_num_accepted_tokens_per_pos_total", "llamacpp:requests_processing"),
            "llamacpp:requests_deferred",
        ),
        llamacpp,
        (_VARYING, "predicted rejections", "texts that still run", "how requests ended, and latencies", *_NOT_TOLD),
        {"top_k": 0, "min_p": 0.0, "top_p": 1.0, "repeat_penalty": 1.0},
    ),
)
WANTED = frozenset(
    {*_SHARED, *(name for flavour in FLAVOURS for name in (*flavour.names, *flavour.marks, *flavour.unless))}
)


def flavour_of(page: Page) -> Flavour | None:
    """Whose page it is, by the names on it; None for nobody's that we know."""
    seen = (f for f in FLAVOURS if any(m in page for m in f.marks) and not any(n in page for n in f.unless))
    return next(seen, None)
