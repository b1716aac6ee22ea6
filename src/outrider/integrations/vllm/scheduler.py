"""vLLM's scheduler with live draft lengths: what a subclass of its scheduler adds, without importing vLLM.

vLLM asks the table `dynamic_sd_lookup` (draft length by number of scheduled requests) in every step for the length to draft now;
its drafts are verified in the next step. We write our length into that table before the step is scheduled. The length of one
request is cut where its drafts are handed to the scheduler: that saves their verification, not their drafting.
"""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Any

from outrider.errors import ConfigError
from outrider.integrations.vllm.lengths import LiveLengths, Request, SeenStep, lengths_of, own_limit
from outrider.integrations.vllm.settings import Settings

logger = logging.getLogger(__name__)
NOTE = "outrider"
"""Attribute of a step's `SchedulerOutput` and `ModelRunnerOutput` with our notes on it: plain numbers, which travel with it."""


class LiveScheduling:
    """Comes before one of vLLM's schedulers in the bases of a class (`outrider.integrations.vllm.Scheduler`)."""

    # set by vLLM's scheduler
    vllm_config: Any
    dynamic_sd_lookup: list[int] | None
    num_spec_tokens: int
    requests: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config
        speculative = config.speculative_config
        if speculative is None:
            raise ConfigError(
                "outrider's scheduler sets draft lengths: give vLLM a --speculative-config, or drop --scheduler-cls"
            )
        settings = Settings.of(config.additional_config)
        self.lengths = lengths_of(settings, self.num_spec_tokens)
        self._own_proposer = speculative.method == "custom_class"  # sets its lengths itself: vLLM has no table for it
        if self.dynamic_sd_lookup is None and not self._own_proposer:
            raise ConfigError(
                "vLLM has no table of draft lengths for us to write: add "
                f'"num_speculative_tokens_per_batch_size": [[1, {config.scheduler_config.max_num_seqs}, {self.num_spec_tokens}]] '
                "to --speculative-config (vLLM drops it with data parallelism and for the methods custom_class, medusa and suffix)"
            )
        self.limits: dict[str, Request] = {}
        self._last: tuple[float, frozenset[str]] = (0.0, frozenset())  # end of the latest step, and the requests in it
        self._before: dict[int, int] = {}  # of steps under way: the length that the step before drafted
        self._drafted = 0
        self._noted: tuple[Any, dict[str, Any]] = (None, {})

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """A step, with our draft length."""
        table = self.dynamic_sd_lookup
        if table is not None:
            table[:] = [self.lengths.next(self._decoding())] * len(table)
        out = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if out.total_num_scheduled_tokens:
            self._before[id(out)] = self._drafted
            self._drafted = out.num_spec_tokens_to_schedule
        setattr(out, NOTE, self.note())
        return out

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """vLLM's, after we have looked at what was accepted."""
        if scheduler_output.total_num_scheduled_tokens:
            self._look(scheduler_output, model_runner_output, perf_counter())
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]

    # ------------------------------------------------------------------ one request
    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """Drafts of the step that has ended (synchronous scheduling): cut to what their requests allow."""
        rows = zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True)
        draft_token_ids.draft_token_ids = [tokens[: self.limit_of(name).cut(len(tokens))] for name, tokens in rows]
        super().update_draft_token_ids(draft_token_ids)  # type: ignore[misc]

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        """Asynchronous scheduling: places for drafts that are still being made, cut likewise. vLLM's own hook of its subclasses."""
        super()._update_after_schedule(scheduler_output)  # type: ignore[misc]
        for name in scheduler_output.num_scheduled_tokens:
            request = self.requests[name]
            places = request.spec_token_ids
            if places and places[0] == -1:
                length = self.limit_of(name).cut(len(places))
                if length < len(places):
                    request.spec_token_ids = places[:length]

    def limit_of(self, name: str) -> Request:
        """What is known of a request's draft lengths, made when it is first asked for."""
        if name not in self.limits:
            request = self.requests.get(name)
            params = getattr(request, "sampling_params", None)
            self.limits[name] = Request(own_limit(getattr(params, "extra_args", None)))
        return self.limits[name]

    # ------------------------------------------------------------------ what a step shows
    def _decoding(self) -> int:
        """Sequences that the next step is expected to decode."""
        return len(self.running)  # type: ignore[attr-defined]

    def _look(self, out: Any, result: Any, now: float) -> None:
        drafts, sampled = out.scheduled_spec_decode_tokens, result.sampled_token_ids
        accepted, decoded = list[int](), list[str]()
        for name, rows in out.num_scheduled_tokens.items():
            at = result.req_id_to_index.get(name)
            tokens = [] if at is None or not sampled else sampled[at]
            if not len(tokens):
                continue  # a prompt chunk
            drafted = len(drafts.get(name, ()))
            if rows == 1 + drafted:
                accepted.append(len(tokens) - 1)
                decoded.append(name)
                self.limit_of(name).saw(drafted, len(tokens) - 1)
        (then, names), here = self._last, frozenset(out.num_scheduled_tokens)
        self._last = now, here
        verified = self._before.pop(id(out), 0)
        if len(self.limits) > 4 * len(here) + 64:
            self.limits = {name: limit for name, limit in self.limits.items() if name in self.requests}
        if self._own_proposer:
            return
        prompts = len(accepted) < len(here)
        busy = now - then if names & here else None
        asked = out.num_spec_tokens_to_schedule
        self.lengths.saw(SeenStep(len(accepted), verified, asked, prompts, busy, accepted, decoded))

    def note(self) -> dict[str, Any]:
        """The controller's estimates, for the page of the server: plain numbers."""
        lengths = self.lengths
        now = lengths, (lengths.measured if isinstance(lengths, LiveLengths) else 0)
        if self._noted[0] != now:  # they take longer than the rest of a step's scheduling
            self._noted = now, note_of(lengths)
        return self._noted[1]


def note_of(lengths: Any) -> dict[str, Any]:
    """Estimates of a controller as plain numbers; none for fixed lengths."""
    if not isinstance(lengths, LiveLengths):
        return {}
    look = lengths.control.outlook()
    return {
        "outlook": [look.sequences, look.length, look.speedup, look.plain_seconds, look.break_even],
        "speeds": [[s.length, s.tokens_per_step, s.cost, s.speedup] for s in lengths.control.speeds()],
    }
