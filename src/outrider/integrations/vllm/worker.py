"""vLLM's worker with a ledger: what a subclass of its worker adds, without importing vLLM."""

from __future__ import annotations

import inspect
import logging
import time
from typing import Any

from outrider.errors import ConfigError
from outrider.integrations.vllm.plain_steps import OTHER, let_steps_be_plain
from outrider.integrations.vllm.rest import let_rest
from outrider.integrations.vllm.scheduler import NOTE
from outrider.integrations.vllm.settings import Settings
from outrider.integrations.vllm.tap import Ruled, Tap, Watched
from outrider.nn.large_pages import Gathered, gather
from outrider.verify.registry import load_rule

logger = logging.getLogger("vllm.outrider")
TAKES = (
    "draft_token_ids",
    "num_draft_tokens",
    "max_spec_len",
    "cu_num_draft_tokens",
    "draft_probs",
    "target_logits",
    "bonus_token_ids",
    "sampling_metadata",
)
"""First arguments of vLLM's `rejection_sample`: we take its place only where they are these."""


class Ledgered:
    """Comes before one of vLLM's workers in the bases of a class (`outrider.integrations.vllm.CpuWorker`, `GpuWorker`)."""

    vllm_config: Any
    model_runner: Any
    tap: Tap | None = None
    unwatched = "no speculation"
    """Why there is no tap; empty if there is one."""
    restless = "no speculation"
    """Why the drafter reads every token also where nothing is drafted; empty if it rests."""
    drafting: str = "no speculation"
    """Why steps without drafts are prepared and sampled as steps with some; empty if they run as without speculation."""
    gathered = Gathered(0, 0)
    """Of the memory of weights, keys and values; none of a GPU's."""
    note: dict[str, Any] | None = None
    """The scheduler's latest note on a step."""

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's; then we stand before its rejection sampler, and tell our proposer about the requests."""
        out = super().load_model(*args, **kwargs)  # type: ignore[misc]
        runner = self.model_runner
        if self.vllm_config.speculative_config is not None:
            self.unwatched = self._watch(runner)
            rule = Settings.of(self.vllm_config.additional_config).rule
            if self.unwatched and rule != "vllm":
                raise ConfigError(f"rule {rule!r} cannot take the place of vLLM's here: {self.unwatched}")
            if self.unwatched:
                logger.warning("outrider keeps no ledger of predicted rejections: %s", self.unwatched)
            speculative, scheduler = self.vllm_config.speculative_config, self.vllm_config.scheduler_config
            self.restless = let_rest(runner, str(speculative.method), scheduler.max_num_batched_tokens)
            self.drafting = self.restless or self._plainly(runner)
        attach = getattr(getattr(runner, "drafter", None), "attach", None)
        if attach is not None:
            attach(runner)
        self._gather()
        return out

    def _watch(self, runner: Any) -> str:
        """Put the tap in place; why not, if that is impossible."""
        if getattr(self, "use_v2_model_runner", False):
            return "the newer model runner has another hook: serve with architectures OutriderLlamaForCausalLM (docs/vllm.md)"
        from vllm.v1.sample import rejection_sampler as module  # type: ignore[reportMissingImports]

        method = self.vllm_config.speculative_config.rejection_sample_method
        settings = Settings.of(self.vllm_config.additional_config)
        tap = Tap(self.vllm_config.speculative_config.num_speculative_tokens)
        problem = stand_in(module, tap, settings, str(method), lambda: runner.input_batch.req_ids)
        self.tap = None if problem else tap
        return problem

    def _plainly(self, runner: Any) -> str:
        """Run steps without drafts as without speculation; why not, if that is impossible."""
        try:
            from vllm.v1.worker.gpu_model_runner import ExecuteModelState  # type: ignore[reportMissingImports]
        except ImportError:
            return OTHER
        return let_steps_be_plain(runner, ExecuteModelState)

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's; its trial runs are not counted. Keys and values are there now."""
        out = super().compile_or_warm_up_model(*args, **kwargs)  # type: ignore[misc]
        self._gather()
        if self.tap is not None:
            self.tap.reset()
        return out

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's; the scheduler's note is kept."""
        self.note = getattr(scheduler_output, NOTE, None) or self.note
        return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def _gather(self) -> None:
        """Move what was loaded into large pages, and say so: see `nn.large_pages.gather`."""
        if str(getattr(self.model_runner, "device", "")) != "cpu":
            return
        began = time.monotonic()
        found = gather()
        self.gathered = Gathered(*map(sum, zip(self.gathered, found, strict=True)))
        if found.of:
            told = "outrider: %d of %d MB moved to pages of 2 MiB in %.1f s (OUTRIDER_LARGE_PAGES=0 leaves them)"
            logger.info(told, found.bytes >> 20, found.of >> 20, time.monotonic() - began)

    def outrider_report(self) -> dict[str, Any]:
        """Sums and estimates as plain numbers; the endpoint asks for them by `collective_rpc`."""
        drafter = getattr(self.model_runner, "drafter", None)
        own = getattr(drafter, "report", None)
        tap = self.tap or getattr(
            getattr(self.model_runner, "rejection_sampler", None), "tap", None
        )  # V2: `v2.WatchedVerify`
        return {
            "tap": None if tap is None else tap.report(),
            "unwatched": self.unwatched,
            "restless": self.restless,
            "drafting": self.drafting,
            "note": self.note or {},
            "proposer": None if own is None else own(),
            "repair": _repaired(),
            "large_pages": self.gathered._asdict(),
        }


def stand_in(module: Any, tap: Tap, settings: Settings, method: str, names: Any) -> str:
    """Replace `rejection_sample` of vLLM's module by one that counts (or by our rule); why not, if that is impossible."""
    present = getattr(module, "rejection_sample", None)
    if isinstance(present, Watched | Ruled):
        present = getattr(present, "inner", None)
    if present is None or tuple(inspect.signature(present).parameters)[: len(TAKES)] != TAKES:
        return "this vLLM's rejection sampler has another interface than those of 0.32 and 0.33"
    if settings.rule != "vllm":
        module.rejection_sample = Ruled(load_rule(settings.rule), tap, names)
        return ""
    if method not in ("standard", "strict", "probabilistic"):
        return f"its rejection_sample_method is {method!r}: the ledger knows the probabilities of 'standard' only"
    module.rejection_sample = Watched(present, tap)
    return ""


def _repaired() -> str:
    """What a probe of the faulty function finds in this process."""
    from outrider.integrations.vllm.repair import found

    return found()
