"""Inside transformers: `model.generate(..., custom_generate=FOLDER, trust_remote_code=True)` decodes with Outrider.

>>> from outrider.integrations.transformers import FOLDER
>>> ids = model.generate(**inputs, assistant_model=small, custom_generate=FOLDER, trust_remote_code=True)  # doctest: +SKIP

Every call builds an engine; who generates often builds one (`Engine.build(model, small, tokenizer=tokenizer)`) and keeps it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from outrider.build import Engine, build_engine
from outrider.engine.outputs import Output
from outrider.errors import ConfigError
from outrider.params import SamplingParams

FOLDER = str(Path(__file__).parent)
"""What `custom_generate` takes."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
READ = {
    *SAMPLING,
    *("do_sample", "max_new_tokens", "max_length", "min_new_tokens", "num_return_sequences", "eos_token_id", "pad_token_id"),
    *("return_dict_in_generate", "num_assistant_tokens", "prompt_lookup_num_tokens"),
}  # fmt: skip
UNUSED = {
    *("bos_token_id", "decoder_start_token_id", "transformers_version", "_from_model_config", "use_cache", "cache_implementation"),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size", "is_assistant"),
}  # fmt: skip
"""Settings that say how transformers computes, not what it generates."""
OBJECTS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "negative_prompt_ids")
IGNORED = {
    "synced_gpus",
    "negative_prompt_attention_mask",
    "use_model_defaults",
    "tokenizer",
    "assistant_tokenizer",
    "use_cache",
}


@torch.no_grad()
def generate(
    model: Any,
    inputs: torch.Tensor | None = None,
    generation_config: Any = None,
    assistant_model: Any = None,
    streamer: Any = None,
    draft: str | None = None,
    **more: Any,
) -> Any:
    """`GenerationMixin.generate` for decoders: the same arguments, the same distribution, the same kind of result.

    draft: another drafter than `assistant_model`, as "ngram". Randomness is torch's: the same seed gives the same tokens.
    Raises ConfigError, with its name, for every argument that would be left out otherwise (beams, processors, scores).
    """
    for name in OBJECTS:
        value = more.pop(name, None)
        if value is not None and (not hasattr(value, "__len__") or len(value)):
            raise ConfigError(
                f"{name} is not applied by Outrider's generate: leave it out, or leave custom_generate out"
            )
    ids, mask = inputs if inputs is not None else more.pop("input_ids", None), more.pop("attention_mask", None)
    if ids is None:
        raise ConfigError(
            "generate needs the token ids of prompts: pass a tokenizer's output, as in model.generate(**inputs)"
        )
    # the call's own settings, then the model's, then transformers' defaults, which truncate to 50 tokens when sampling
    config, rest = model._prepare_generation_config(generation_config, **more)
    rest = {
        name: value for name, value in rest.items() if name not in IGNORED and value is not None and value is not False
    }
    if rest:
        raise ConfigError(f"{min(rest)} is not applied by Outrider's generate: leave it out")
    params = params_of(config, ids.shape[1])
    prompts = ids.tolist() if mask is None else [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]
    lookup = config.prompt_lookup_num_tokens
    engine = build_engine(
        model,
        assistant_model if assistant_model is not None else draft or ("ngram" if lookup else "none"),
        length=int(lookup or config.num_assistant_tokens or 4),
        slots=min(16, len(prompts) * params.n),
    )
    if streamer is not None:
        outputs = [_streamed(engine, prompts, params, streamer)]
    else:
        outputs = [o for r in engine.generate(prompts, [_seeded(params) for _ in prompts]) for o in r.outputs]
    found = _whole(ids.repeat_interleave(params.n, 0), [list(o.token_ids) for o in outputs], config)
    if not config.return_dict_in_generate:
        return found
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=found)  # type: ignore[arg-type]


def params_of(config: Any, prompt: int) -> SamplingParams:
    """The sampling parameters that a generation configuration means. ConfigError for one that is not read here."""
    usual = config._get_default_generation_params()
    for name, value in config.to_dict().items():
        if name not in READ | UNUSED and value is not None and value is not False and value != usual.get(name):
            raise ConfigError(f"{name}={value!r} is not applied by Outrider's generate: leave it out")
    sampled: dict[str, Any] = (
        {n: v for n in SAMPLING if (v := getattr(config, n)) is not None} if config.do_sample else {"temperature": 0.0}
    )
    if not config.do_sample and config.repetition_penalty:
        sampled["repetition_penalty"] = config.repetition_penalty
    ends = config.eos_token_id
    most = config.max_new_tokens or max(1, (config.max_length or 20) - prompt)
    return SamplingParams(
        **sampled,
        max_tokens=most,
        min_tokens=config.min_new_tokens or 0,
        n=config.num_return_sequences or 1,
        stop_token_ids=() if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (ends,),
        ignore_eos=True,  # what ends a text is in `stop_token_ids`: this call's own
    )


def _seeded(params: SamplingParams) -> SamplingParams:
    """With a seed from torch's generator, so that torch.manual_seed decides; greedy text leaves the generator alone."""
    return params if params.temperature == 0 else replace(params, seed=int(torch.randint(1 << 62, ()).item()))


def _streamed(engine: Engine, prompts: list[list[int]], params: SamplingParams, streamer: Any) -> Output:
    """One text, whose tokens the streamer gets as they come."""
    if len(prompts) * params.n != 1:
        raise ConfigError("a streamer takes one text: pass one prompt and num_return_sequences=1")
    streamer.put(torch.tensor(prompts))
    name = engine.submit(prompts[0], _seeded(params))
    (sequence,) = engine.sequences(name)
    while engine.busy:
        for event in engine.step():
            streamer.put(torch.tensor(event.tokens))
    streamer.end()
    return Output(0, tuple(sequence.output), "", sequence.finish_reason or "", sequence.counts, tuple(sequence.origins))


def _whole(ids: torch.Tensor, outputs: list[list[int]], config: Any) -> torch.Tensor:
    """Prompts as they were given, and behind each its output, padded on the right."""
    ends, most = config.eos_token_id, max(map(len, outputs))
    pad = config.pad_token_id if config.pad_token_id is not None else ends[0] if isinstance(ends, list) else ends or 0
    rows = [tokens + [pad] * (most - len(tokens)) for tokens in outputs]
    return torch.cat((ids, torch.tensor(rows, dtype=ids.dtype, device=ids.device)), 1)
