"""The hook of vLLM's newer model runner: a model class whose state puts our watch around its rejection sampler.

UNTESTED: this runner needs Triton, which our test machines do not have. Written against 0.33's interfaces and type-checked only.
Select it with `--hf-overrides '{"architectures": ["OutriderLlamaForCausalLM"]}'` for a Llama checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from outrider.integrations.vllm.tap import Tap, risks

ARCHITECTURE = "OutriderLlamaForCausalLM"


def register() -> None:
    """Make the architecture known to vLLM; nothing is imported until a server asks for it."""
    from vllm import ModelRegistry  # type: ignore[reportMissingImports]

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "outrider.integrations.vllm:OutriderLlama")


def llama() -> type:
    """vLLM's Llama, with our model state."""
    from vllm.model_executor.models.llama import LlamaForCausalLM  # type: ignore[reportMissingImports]

    return type("OutriderLlama", (LlamaForCausalLM,), {"get_model_state_cls": staticmethod(state)})


def state() -> type:
    """vLLM's model state, with our `custom_sampler`."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState  # type: ignore[reportMissingImports]

    return type("OutriderModelState", (_WatchedState, DefaultModelState), {})


class _WatchedState:
    vllm_config: Any
    device: torch.device

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        """vLLM's own sampler, and its rejection sampler with our watch; None without speculation."""
        config = self.vllm_config.speculative_config
        if config is None:
            return None
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler import (  # type: ignore[reportMissingImports]
            RejectionSampler,
        )

        made: Any = type("WatchedRejectionSampler", (WatchedVerify, RejectionSampler), {})
        watched = made(sampler, config, self.device)
        watched.tap = Tap(config.num_speculative_tokens)
        return sampler, watched


class WatchedVerify:
    """Comes before the newer runner's `RejectionSampler`: same results, and the tap gets its sums. Drafts whose distributions are
    handed over (`draft_sample_method` "probabilistic") are not counted."""

    tap: Tap
    sampler: Any

    def _verify(
        self,
        logits: Tensor,
        draft_logits: Tensor | None,
        draft_sampled: Tensor,
        pos: Tensor,
        cu_num_logits: Tensor,
        idx_mapping: Tensor,
        *more: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """vLLM's. The rows of request b are cu_num_logits[b : b + 2]; draft_sampled has the token that each row was fed."""
        done = super()._verify(  # type: ignore[misc]
            logits, draft_logits, draft_sampled, pos, cu_num_logits, idx_mapping, *more
        )
        processed, _, num_sampled = done
        if draft_logits is None:
            rows = torch.diff(cu_num_logits.long())
            keep = torch.ones(len(processed), dtype=torch.bool, device=processed.device)
            keep[cu_num_logits[1:].long() - 1] = False  # the last row of a request verifies nothing
            token = draft_sampled.roll(-1)[keep]  # row j verifies the token that row j + 1 was fed
            cold = self.sampler.sampling_states.temperature.gpu[idx_mapping.long()] == 0
            greedy = torch.repeat_interleave(cold, rows - 1)
            risk = risks(processed[keep].float(), token, None, greedy)
            self.tap.add((rows - 1).tolist(), token, risk, num_sampled.long() - 1, ())
        return done
