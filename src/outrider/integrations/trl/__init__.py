"""Rollouts for TRL's GRPO: `GRPOTrainer(..., rollout_func=rollout(draft="ngram"))`, with exact log-probabilities.

The text is written by the model that is being trained, as it is at that step: its weights are read in place. The log-probabilities
are those of the distribution that the tokens were drawn from, whatever was drafted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from outrider.build import Engine, build_engine
from outrider.errors import CapabilityError, ConfigError
from outrider.params import SamplingParams

Rollout = Callable[[list[Any], Any], dict[str, list[Any]]]
NEUTRAL = {
    "top_p": (None, 1.0), "top_k": (None, 0, -1), "min_p": (None, 0, 0.0), "repetition_penalty": (None, 1.0),
    "generation_kwargs": (None, {}),
}  # fmt: skip
"""Settings of the trainer under which a token's log-probability is that of the model."""


def rollout(draft: Any = "ngram", *, slots: int = 16, **options: Any) -> Rollout:
    """A `rollout_func` of `trl.GRPOTrainer`. draft: a name, a path, a drafter or a small model; options: as for `Engine.build`.

    One completion for each prompt of its list, which TRL has repeated already. Raises ConfigError where the trainer samples at
    another temperature than 1 or truncates: the log-probabilities would not be those of the tokens' distribution.
    """
    kept: list[tuple[Any, Engine]] = []

    def engine_of(trainer: Any) -> Engine:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if kept and kept[0][0] is model:
            try:
                _ = kept[0][1].parts.target.weights  # type: ignore[attr-defined]
                return kept[0][1]
            except CapabilityError:  # it was moved since
                pass
        kept[:] = [(model, build_engine(model, draft, tokenizer=_text(trainer), slots=slots, **options))]
        return kept[0][1]

    def rollout_func(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        args = trainer.args
        if args.temperature != 1.0:
            raise ConfigError(
                f"the rollout needs temperature=1.0 in GRPOConfig, got {args.temperature}: log-probabilities are the model's own"
            )
        for name, fine in NEUTRAL.items():
            if getattr(args, name, None) not in fine:
                raise ConfigError(
                    f"the rollout cannot apply {name}={getattr(args, name)!r} of GRPOConfig: leave it out"
                )
        engine = engine_of(trainer)
        template = getattr(args, "chat_template_kwargs", None) or {}
        ids = [_ids(_text(trainer), prompt, template) for prompt in prompts]
        results = engine.generate(
            ids, SamplingParams(max_tokens=args.max_completion_length, logprobs=0), progress=lambda _: None
        )
        outputs = [result.outputs[0] for result in results]
        return {
            "prompt_ids": ids,
            "completion_ids": [list(output.token_ids) for output in outputs],
            "logprobs": [[entry.logprob for entry in output.logprobs] for output in outputs],
        }

    return rollout_func


def _text(trainer: Any) -> Any:
    """The tokenizer, which may be part of a processor."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def _ids(tokenizer: Any, prompt: Any, template: dict[str, Any]) -> list[int]:
    """Token ids of a prompt: text, or messages under the tokenizer's chat template, which gets the trainer's settings of it."""
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt))
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    return list(tokenizer.apply_chat_template(prompt, **asked, **template))
