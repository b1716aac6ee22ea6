"""Models and tokenizers that are given as objects of transformers: used as target and draft, and left as they were found."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from outrider import Engine, SamplingParams
from outrider.assets import shipped
from outrider.build import companion
from outrider.errors import CapabilityError, ConfigError
from outrider.loading import name_of
from outrider.models.hf.fresh import small_llama
from outrider.models.hf.target import HFTarget

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
PROMPTS = ["def main(", "class Parser:\n"]

TORCHS_OWN = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
"""`torch.compile` imports a module of PyTorch that still says it: nothing of ours will go with it."""


@pytest.fixture
def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    found = (AutoModelForCausalLM.from_pretrained(shipped(n), dtype=torch.float32) for n in ("target", "draft"))
    return tuple(m.train() for m in found)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(Path(shipped("target")))


def state(model: PreTrainedModel) -> dict[str, Any]:
    """All of a model that an engine might change."""
    return {
        "modes": [m.training for m in model.modules()],
        "modules": [id(m) for m in model.modules()],
        "gradients": [p.requires_grad for p in model.parameters()],
        "parameters": [(id(p), p.data_ptr(), p._version, p.grad is None) for p in model.parameters()],
        "hooks": [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()],
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "generation": model.generation_config.to_dict(),
        "forward": model.forward,
        "random": torch.get_rng_state().tolist(),
    }


def test_objects_decode_as_their_folders_do_and_stay_as_they_were(pair: Any, tokenizer: Any) -> None:
    target, draft = pair
    target.model.layers[1].mlp.weightless = 1
    target.lm_head.requires_grad_(False)
    target.config.return_dict = False
    heard: list[int] = []
    target.model.layers[0].register_forward_hook(lambda *_: heard.append(1))
    before = state(target), state(draft)
    engine = Engine.build(target, draft, tokenizer=tokenizer, draft_tokenizer=tokenizer, length=3, slots=2)
    texts = [r.text for r in engine.generate(PROMPTS, GREEDY)]
    again = companion(engine, target, length=2).generate(PROMPTS, GREEDY)  # its own draft
    assert (state(target), state(draft)) == before
    folder = Engine.build(shipped("target"), shipped("draft"), dtype="float32", implementation="hf", length=3, slots=2)
    assert texts == [r.text for r in folder.generate(PROMPTS, GREEDY)] == [r.text for r in again]
    assert engine.eos == folder.eos and engine.counts.accepted > 3
    assert heard  # its hooks are part of the model
    target.config.return_dict = True
    loss = target(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()
    assert target.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_weights_that_are_written_are_used_from_then_on_and_what_was_cached_is_not(tokenizer: Any) -> None:
    """A step of an optimizer between two calls: the second is what a new engine on the new weights says, shared beginning or "
    "not."""
    model = small_llama(300, 64, 2, 512, seed=3)
    engine = Engine.build(model, "none", length=0, slots=1)
    prompt, params = list(range(3, 280)), SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    first = engine.generate([prompt], params)[0].outputs[0].token_ids
    assert engine.generate([prompt], params)[0].outputs[0].token_ids == first
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        model(input_ids=torch.tensor([prompt]), labels=torch.tensor([prompt])).loss.backward()
        optimizer.step()
    second = engine.generate([prompt], params)[0].outputs[0].token_ids
    assert second == Engine.build(model, "none", length=0, slots=1).generate([prompt], params)[0].outputs[0].token_ids
    assert second != first


def test_a_model_that_was_converted_is_refused_by_name() -> None:
    model = small_llama(300, 64, 2, 128)
    engine = Engine.build(model, "none", length=0, slots=1)
    model.to(torch.bfloat16)
    with pytest.raises(CapabilityError, match="LlamaForCausalLM was moved or converted"):
        engine.generate([[1, 2, 3]], GREEDY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "dtype='float32' is for models that are loaded here, and the target"),
        ({"target_quantize": "q8_0"}, "target_quantize='q8_0' is for models"),
        ({"draft_quantize": "q8_0"}, "draft_quantize='q8_0' is for models that are loaded here, and the draft"),
        ({"draft_vocabulary": 100}, "draft_vocabulary=100 is for models that are loaded here, and the draft"),
    ],
)
def test_options_of_loading_are_refused(options: dict[str, Any], message: str) -> None:
    model = small_llama(300, 64, 2, 128)
    with pytest.raises(ConfigError, match=message):
        Engine.build(model, model, **options)


def test_ends_of_text_are_the_models_and_the_tokenizers(tokenizer: Any) -> None:
    model = small_llama(300, 64, 2, 128)
    model.generation_config.eos_token_id = [7, 8]
    engine = Engine.build(model, "none", tokenizer=tokenizer)
    assert engine.eos == {7, 8, tokenizer.eos_token_id}
    model.generation_config.suppress_tokens = [5]
    with pytest.raises(ConfigError, match="the model's generation_config sets suppress_tokens"):
        Engine.build(model, "none", tokenizer=tokenizer)


@TORCHS_OWN
def test_a_compiled_model_and_tied_weights_are_read_too() -> None:
    model = small_llama(300, 64, 2, 128)
    compiled = torch.compile(model)
    assert Engine.build(compiled, "none", length=0).generate([[1, 2]], GREEDY)[0].outputs[0].token_ids
    seen = HFTarget(model).model
    assert seen.lm_head.weight is seen.model.embed_tokens.weight
    assert seen.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


@TORCHS_OWN
def test_a_model_lives_as_long_as_its_target() -> None:
    """Engines know a model by its address, which another one of its class might have else: then it would draft in its place."""
    model = small_llama(300, 64, 2, 128)
    target, alive, name = HFTarget(model), weakref.ref(model), name_of(torch.compile(model))
    assert name == name_of(model)
    del model
    gc.collect()
    assert alive() is not None
    del target
    gc.collect()
    assert alive() is None


def test_what_cannot_be_copied_is_refused() -> None:
    import threading

    model = small_llama(300, 64, 2, 128)
    model.lock = threading.Lock()
    with pytest.raises(CapabilityError, match="cannot be read without changing it"):
        HFTarget(model)
