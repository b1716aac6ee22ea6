"""Worker: `generate` of transformers, plain and assisted. Setting: assistant_tokens (0 = plain), constant per call."""

from __future__ import annotations

from typing import Any

import channel
import torch
import transformers


def load(what: channel.Load) -> tuple[channel.Run, dict[str, str]]:
    """Load both models with the default (SDPA) attention."""
    torch.set_num_threads(what.threads)
    dtype = getattr(torch, what.dtype)
    target = transformers.AutoModelForCausalLM.from_pretrained(what.target, dtype=dtype).eval()
    draft = transformers.AutoModelForCausalLM.from_pretrained(what.draft, dtype=dtype).eval()
    calls = [0]
    target.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    def run(command: channel.Command) -> dict[str, Any]:
        prompts = torch.tensor(command.prompts)
        options = _options(command, draft)
        transformers.set_seed(command.seed)
        calls[0] = 0

        def generate() -> list[list[int]]:
            out = target.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
            return out[:, prompts.shape[1] :].tolist()

        return channel.timed(generate, command) | {"calls": calls[0] * len(command.prompts)}

    return run, {"transformers": transformers.__version__, "torch": torch.__version__}


def _options(command: channel.Command, draft: Any) -> dict[str, Any]:
    """Arguments of `generate`: the full distribution at the temperature (top_k is 50 by default), the assistant if wanted."""
    options: dict[str, Any] = {"max_new_tokens": command.tokens, "do_sample": command.temperature > 0}
    if command.temperature > 0:
        options |= {"temperature": command.temperature, "top_k": 0, "top_p": 1.0}
    if count := command.setting["assistant_tokens"]:
        draft.generation_config.num_assistant_tokens = count
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0  # above 0 it stops drafting early, at any schedule
        options["assistant_model"] = draft
    return options


if __name__ == "__main__":
    channel.serve(load)
