"""Families without a place on the fast paths are driven as transformers' own `generate` drives them: same calls, same text.

What a step costs is counted in tokens fed to the model, not in seconds: they must not grow with the text.
"""

from __future__ import annotations

import inspect
import logging
from contextlib import contextmanager

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from benchmarks import model_sizes, model_table
from benchmarks.families import FAMILIES, PROMPT, build, engine_of, known, ours, theirs
from benchmarks.model_table import Told
from outrider import SamplingParams
from outrider.build import companion
from outrider.errors import ConfigError
from outrider.models.admit import require_layers
from outrider.models.hf.target import HFTarget

NEW = 16
DAILY = ("bamba", "bloom", "falcon", "gpt_neo", "mamba2", "phi3", "qwen3_next", "rwkv", "stablelm", "jamba", "lfm2")
SPREAD = [f if f in DAILY else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


@contextmanager
def counted(model: PreTrainedModel):
    """Tokens of every call of the model."""
    fed: list[int] = []

    def count(module: object, args: tuple, kwargs: dict) -> None:
        given = args[0] if args else kwargs["input_ids"]
        fed.append(given.shape[1])

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield fed
    finally:
        hook.remove()


@pytest.mark.parametrize("family", SPREAD)
def test_a_step_costs_what_it_costs_in_transformers(family: str, caplog: pytest.LogCaptureFixture) -> None:
    if not known(family):
        pytest.skip("not in this release of transformers")
    model = build(family)
    engine = engine_of(model, 64)
    assert engine.parts.target.path != "recompute", engine.parts.target.why
    with counted(
        model
    ) as expected:  # first: what a model says of itself, often once a process, it says to `generate` too
        reference = theirs(model, NEW)
    caplog.clear()
    with counted(engine.parts.target.model) as fed, caplog.at_level(logging.WARNING), propagating():
        text = ours(engine, NEW)
    assert not deprecations(caplog)
    if text != reference:  # 5.16 loses all but one token where Phi-3 changes its frequencies
        assert text == theirs(model, NEW, use_cache=False)
        pytest.skip("this release's own generate decodes another text with its cache than without")
    assert fed == expected


RECURRENT = ("qwen3_next", "bamba", "lfm2", "rwkv", "mamba2", "jamba", "olmo_hybrid", "falcon_mamba")
STATES = [f if f in ("qwen3_next", "rwkv") else pytest.param(f, marks=pytest.mark.slow) for f in RECURRENT]


@pytest.mark.parametrize("family", STATES)
def test_drafts_on_a_state_that_cannot_be_cut_give_the_text_of_transformers(family: str) -> None:
    """Two sequences at a time, drafts accepted and rejected in turn; a model that reads pieces takes one call a step."""
    model = build(family)
    reference = theirs(model, NEW)
    engine = companion(engine_of(model, 64), Told(reference, 3), length=3, slots=2)
    target = engine.parts.target
    assert target.path == "snapshots"
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    with counted(target.model) as fed:
        found = [list(r.outputs[0].token_ids) for r in engine.generate([PROMPT, PROMPT], params)]
    assert found == [reference, reference]
    assert engine.counts.accepted > 10
    assert engine.counts.rejected > 3
    if not target.serving_path.by_token:
        assert len(fed) == engine.counts.steps


def test_a_state_that_a_model_keeps_in_its_modules_is_each_sequences_own() -> None:
    """RecurrentGemma returns no state: its modules have it between calls, and sequences take turns in them."""
    model = model_sizes.build("recurrent_gemma")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    prompts = [model_table.PROMPT, model_table.PROMPT[5:12]]
    with torch.no_grad():
        out = [model.generate(torch.tensor([p]), max_new_tokens=NEW, do_sample=False)[0, len(p) :] for p in prompts]
    reference = [tokens.tolist() for tokens in out]
    assert reference[0] != reference[1]
    engine = companion(engine_of(model, 64), Told(reference[0], 3), length=3, slots=2)
    target = engine.parts.target
    assert target.path == "snapshots" and target.serving_path.by_token
    before = [vars(m).get("conv1d_state") for m in target.model.modules()]
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    found = [list(r.outputs[0].token_ids) for r in engine.generate(prompts, params)]
    assert found == reference and engine.counts.accepted and engine.counts.rejected
    after = [vars(m).get("conv1d_state") for m in target.model.modules()]
    assert all(a is b for a, b in zip(before, after, strict=True)) and len(before) > 5  # nothing of a text stays behind


def deprecations(caplog: pytest.LogCaptureFixture) -> set[str]:
    """transformers deprecates in its log, not by warnings."""
    return {r.getMessage() for r in caplog.records if "deprecated" in r.getMessage().lower()}


def test_a_model_that_counts_from_zero_in_every_call_is_told_its_positions() -> None:
    """In half precision too, where the logits of a short text do not show that it was not."""
    model = build("bamba").bfloat16()
    engine, told = engine_of(model, 64), []
    hook = engine.parts.target.model.register_forward_pre_hook(
        lambda _m, _a, kw: told.extend(kw["position_ids"][0].tolist()), with_kwargs=True
    )
    ours(engine, NEW)
    hook.remove()
    assert engine.parts.target.path == "snapshots"
    assert told == list(range(len(PROMPT) + NEW - 1))


@contextmanager
def propagating():
    """transformers keeps its log to itself otherwise."""
    logger = transformers.logging.get_logger("transformers")
    before, logger.propagate = logger.propagate, True
    try:
        yield
    finally:
        logger.propagate = before


def test_a_text_that_outgrows_its_frequencies_is_read_once_more_and_no_more() -> None:
    model = build("phi3", positions=64)  # other frequencies beyond 32 tokens
    with counted(model) as fed:
        ours(engine_of(model, 64), 20)
    again = [n for n in fed[fed.index(len(PROMPT)) + 1 :] if n > 1]
    assert again == [33]


class Output(dict):
    """What a call returns, by key and by attribute."""

    def __getattr__(self, name: str) -> object:
        if name not in self:
            raise AttributeError(name)
        return self[name]


def renamed(inner: PreTrainedModel, argument: str, returned: str) -> PreTrainedModel:
    """`inner` as a later release may have it: it swallows what it does not know, takes its state as `argument` and returns
    it as `returned`."""
    kind = type(inner)
    target = HFTarget(inner)
    way = target.serving_path.handover  # type: ignore[attr-defined]

    class Later(kind):  # type: ignore[misc, valid-type]
        pass

    def forward(self, input_ids=None, inputs_embeds=None, use_cache=None, **kwargs):
        state = kwargs.pop(argument, None)
        kwargs = {k: v for k, v in kwargs.items() if k in ("position_ids", "outrider", "logits_to_keep")}
        given = {} if state is None else {way.argument: state}
        out = kind.forward(
            self, input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=use_cache, **given, **kwargs
        )
        return Output(
            {("logits" if k == "logits" else returned if k == way.returned else k): v for k, v in out.items()}
        )

    old = inspect.signature(forward)
    parameters = list(old.parameters.values())
    parameters.insert(2, inspect.Parameter(argument, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None))
    forward.__signature__ = old.replace(parameters=parameters)  # type: ignore[attr-defined]
    Later.forward = forward
    inner.__class__ = Later
    return inner


@pytest.mark.parametrize(("argument", "returned"), [("memory", "memory"), ("what_was_read", "kept")])
@pytest.mark.parametrize("family", ["bloom", "mamba2"])
def test_the_next_rename_changes_nothing(family: str, argument: str, returned: str) -> None:
    model = build(family)
    before = HFTarget(model)
    text = ours(engine_of(model, 64), NEW)
    later = renamed(model, argument, returned)
    target = HFTarget(later)
    assert (target.path, target.why) == (before.path, before.why)
    with counted(later) as fed:
        assert ours(engine_of(later, 64), NEW) == text
    assert fed[-NEW + 1 :] == [1] * (NEW - 1)


def test_recomputing_is_said_with_its_reason() -> None:
    config = transformers.AutoConfig.for_model(
        "openai-gpt", n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=64
    )
    target = HFTarget(transformers.AutoModelForCausalLM.from_config(config))
    assert target.path == "recompute"
    (notice,) = target.notices
    assert (
        "recomputing the whole text at every step, whose time grows with its length, because it returns no state"
        in notice
    )
    assert notice.count(": ") == 1 and "\n" not in notice  # one remedy, one line


def test_a_model_that_cannot_run_is_refused_in_a_sentence() -> None:
    model = build("bloom")
    model.lm_head = torch.nn.Linear(31, 512)
    with pytest.raises(ConfigError, match=r"BloomForCausalLM fails on a text of 8 tokens \(.*\): check"):
        HFTarget(model)


def test_a_model_that_needs_more_than_text_is_refused_by_what_it_demands() -> None:
    with pytest.raises(
        ConfigError, match=r"^BlipFor\w+ reads pixel_values in every call and cannot continue a text alone: use"
    ):
        HFTarget(model_sizes.build("blip"))


def test_layers_that_see_a_prompt_otherwise_than_what_follows_are_refused() -> None:
    """Unlimited OCR: a window of what was written, all of the prompt. Its text was another one from the 25th token on."""
    pytest.importorskip("transformers.models.unlimited_ocr", reason="an older transformers")
    config = transformers.AutoConfig.for_model("unlimited_ocr")
    with pytest.raises(ConfigError, match=r"sees all of its prompt but only a window of what it wrote"):
        require_layers(config, "UnlimitedOcrForConditionalGeneration")
    config.get_text_config(decoder=True).layer_types = ["full_attention"] * 12
    require_layers(config, "UnlimitedOcrForConditionalGeneration")


def test_a_configuration_without_a_number_of_layers_is_refused_for_that() -> None:
    """BLT, for which transformers cannot make a cache either."""
    config = transformers.AutoConfig.for_model("blt", encoder_hash_byte_group_vocab=97)
    with pytest.raises(ConfigError, match=r"^BltForCausalLM has no number of layers in its configuration, so that"):
        require_layers(config, "BltForCausalLM")
    config = transformers.AutoConfig.for_model("llava").text_config
    assert require_layers(config, "LlamaForCausalLM") is config


@pytest.mark.parametrize(
    ("family", "words"),
    [("bloom", "few slots"), ("mamba2", "read again"), ("mamba", "one token a call"), ("phi3", "max_length")],
)
def test_what_a_path_costs_is_said(family: str, words: str) -> None:
    (notice,) = HFTarget(build(family)).notices
    assert words in notice
