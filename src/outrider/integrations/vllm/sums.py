"""The part of the ledger that needs no distributions: from vLLM's statistics of every step to our sums, without importing vLLM."""

from __future__ import annotations

from time import monotonic
from typing import Any

from outrider.records import Counts
from outrider.telemetry.prometheus import Finished, Metrics

BUSY = 5.0
"""Seconds between two steps above which the engine counts as having been idle."""


class StepSums:
    """Sums over all steps of one engine. `metrics` is what the page, the alerts and Prometheus read.

    What vLLM reports per step is summed over its requests. Judged positions follow from that only if all drafts of the step had one
    length, or there was one draft; `unsure` counts the positions by which they may be too high otherwise. vLLM counts accepted
    tokens behind the end of a text; what was emitted is counted apart.
    """

    def __init__(self, model: str) -> None:
        self.metrics = Metrics(model)
        self.unsure = 0
        self.kv_usage = 0.0
        self._last: float | None = None

    def record(self, scheduler: Any, iteration: Any) -> None:
        """One step: vLLM's `SchedulerStats` and `IterationStats`, each of which may be missing."""
        m, now = self.metrics, monotonic()
        if scheduler is not None:
            m.running = int(scheduler.num_running_reqs)
            m.waiting = int(scheduler.num_waiting_reqs) + int(getattr(scheduler, "num_skipped_waiting_reqs", 0))
            self.kv_usage = float(scheduler.kv_cache_usage)
            if scheduler.spec_decoding_stats is not None:
                m.counts.merge(self._speculation(scheduler.spec_decoding_stats))
        if iteration is None:
            return
        emitted = int(iteration.num_generation_tokens)
        m.counts.emitted += emitted
        m.counts.steps += len(iteration.time_to_first_tokens_iter) + len(iteration.inter_token_latencies_iter)
        if emitted:
            m.steps += 1
            if self._last is not None and now - self._last < BUSY:
                m.seconds["target"] += now - self._last  # of the whole step: vLLM does not time its parts
        self._last = now if m.running or m.waiting else None
        for request in iteration.finished_requests:
            m.finished(_finished(request))

    def _speculation(self, stats: Any) -> Counts:
        """The drafts that one step verified."""
        drafted, accepted = list(stats.num_draft_tokens_per_pos), list(stats.num_accepted_tokens_per_pos)
        before = [int(stats.num_drafts), *accepted[:-1]]  # drafts whose positions above this depth were accepted
        judged = [min(reached, there) for reached, there in zip(before, drafted, strict=True)]
        sure = [max(0, reached + there - stats.num_drafts) for reached, there in zip(before, drafted, strict=True)]
        if stats.num_drafts > 1:
            self.unsure += sum(j - max(s, a) for j, s, a in zip(judged, sure, accepted, strict=True) if j > s)
        depth = next((d for d in range(len(judged), 0, -1) if judged[d - 1]), 0)
        return Counts(
            proposed=int(stats.num_draft_tokens),
            judged=sum(judged),
            accepted=int(stats.num_accepted_tokens),
            rejected=sum(judged) - int(stats.num_accepted_tokens),
            accepted_at=[int(n) for n in accepted[:depth]],
            judged_at=[int(n) for n in judged[:depth]],
        )


def served_name(config: Any) -> str:
    """The model's name for clients, in vLLM's configuration."""
    names = config.model_config.served_model_name
    return str(names[0] if isinstance(names, list) else names)


def _finished(request: Any) -> Finished:
    """A request that ended, as our metrics count it."""
    reason, tokens, total = str(request.finish_reason), int(request.num_generation_tokens), float(request.e2e_latency)
    first = max(0.0, total - float(request.decode_time)) if tokens else None
    return Finished(reason, int(request.num_prompt_tokens), tokens, first, total, Counts())
