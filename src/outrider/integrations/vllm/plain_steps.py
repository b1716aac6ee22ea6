"""Steps of vLLM's runner in which nothing is drafted and no draft is verified, run as a runner without speculation runs them.

Otherwise such a step prepares drafts that nobody asked for and samples through the sampler for drafts. The runner's speculative
configuration is out of sight meanwhile, and what the drafter would have read is put aside (`rest.Resting`). Texts have the same
distribution: with no draft both paths sample every token from the target's own logits.
Shapes: n rows of a step, one of each sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from outrider.integrations.vllm.rest import Resting, StepRows

READS = (
    "execute_model",
    "sample_tokens",
    "execute_model_state",
    "speculative_config",
    "use_aux_hidden_state_outputs",
    "input_ids",
    "_get_positions",
    "input_batch",
)
"""Attributes of vLLM's runner that are read here."""
OTHER = "this vLLM's runner has another interface than that of 0.32"
STATE = ("scheduler_output", "hidden_states", "aux_hidden_states", "slot_mappings")
"""What a step leaves for sampling."""


class PlainSteps:
    """Stands before `execute_model` and `sample_tokens` of a runner of vLLM whose drafter rests. layer: of the drafter's cache."""

    def __init__(self, runner: Any, resting: Resting, layer: str) -> None:
        self._runner, self._resting, self._layer = runner, resting, layer
        self._execute, self._sample = runner.execute_model, runner.sample_tokens
        self._now = False

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's; without speculation where the step needs none."""
        rows = scheduler_output.total_num_scheduled_tokens
        self._now = needs_no_drafter(scheduler_output) and self._resting.has_room(rows)
        with self._unspeculative():
            return self._execute(scheduler_output, *args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, of the step that `execute_model` ran; its rows wait for the drafter."""
        state = self._runner.execute_model_state
        if self._now and state is not None:
            self._resting.put_aside(list(self._runner.input_batch.req_ids), self._rows(state))
        with self._unspeculative():
            return self._sample(*args, **kwargs)

    @contextmanager
    def _unspeculative(self) -> Iterator[None]:
        """While this lasts the runner has no speculation, if this is such a step."""
        runner = self._runner
        held = runner.speculative_config
        try:
            if self._now:
                runner.speculative_config = None
            yield
        finally:
            runner.speculative_config = held

    def _rows(self, state: Any) -> StepRows:
        """What the drafter would read of this step; none of it is in buffers that vLLM writes again."""
        runner, n = self._runner, state.scheduler_output.total_num_scheduled_tokens
        several = state.aux_hidden_states if runner.use_aux_hidden_state_outputs else [state.hidden_states]
        hidden = tuple(h[:n] for h in several)  # made by this step's forward
        place = state.slot_mappings[self._layer][:n]
        return StepRows(runner.input_ids.gpu[:n], runner._get_positions(n), hidden, place).apart()


def needs_no_drafter(scheduler_output: Any) -> bool:
    """Whether every sequence of a step has one row, none verifies a draft, and no draft is asked for."""
    rows = scheduler_output.num_scheduled_tokens.values()
    asked = scheduler_output.num_spec_tokens_to_schedule or any(scheduler_output.scheduled_spec_decode_tokens.values())
    return not asked and bool(rows) and max(rows) == 1


def let_steps_be_plain(runner: Any, states: type) -> str:
    """Put `PlainSteps` before the steps of a runner whose drafter rests; why not, if that is impossible.

    states: the class of what a step leaves for sampling.
    """
    resting = runner.drafter.propose
    layers = sorted(getattr(runner.drafter, "_draft_attn_layer_names", ()))
    missing = [name for name in READS if not hasattr(runner, name)]
    if missing or not set(STATE) <= set(getattr(states, "_fields", ())) or not layers:
        return OTHER
    if getattr(runner, "use_async_scheduling", True):
        return "with asynchronous scheduling a step prepares the next one's drafts"
    if runner.model_config.is_hybrid:
        return "states of recurrent layers are stored by drafts"
    if runner.supports_mm_inputs or runner.uses_mrope or hasattr(runner.get_model(), "get_mtp_target_hidden_states"):
        return "the drafter reads other rows than the target"
    if runner.vllm_config.kv_transfer_config is not None or runner.parallel_config.pipeline_parallel_size > 1:
        return "a step has other machines to tell"
    steps = PlainSteps(runner, resting, layers[0])
    runner.execute_model, runner.sample_tokens = steps.execute_model, steps.sample_tokens
    return ""
