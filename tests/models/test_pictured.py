"""The text part of models that read pictures: their text is that of transformers' own generate on text alone, with and without
drafts; and what looks like a language model and is none is refused in a sentence."""

from __future__ import annotations

import pytest
import torch

from benchmarks.model_sizes import build
from benchmarks.model_table import Told, decode, reference
from outrider.build import Engine, companion
from outrider.errors import ConfigError
from outrider.models.hf.target import HFTarget
from outrider.models.load import inspect_checkpoint

NEW = 16
FAMILIES = ("qwen2_5_vl", *(pytest.param(f, marks=pytest.mark.slow) for f in ("mistral3", "qwen3_vl", "gemma3")))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_transformers(family: str) -> None:
    model = build(family)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    expected = reference(model, NEW)
    target = HFTarget(model)
    engine = Engine.build(target=target, draft="none", length=0, slots=2, max_length=128)
    assert decode(engine, NEW) == expected
    drafted = companion(engine, Told(expected, 3), length=3)
    assert decode(drafted, NEW) == expected
    assert drafted.counts.accepted and drafted.counts.rejected
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        heard = target.model(input_ids=tokens).logits
    assert heard.shape[-1] == target.vocab_size


def test_a_checkpoint_loads_as_a_target_and_the_doctor_knows_it(tmp_path) -> None:
    build("qwen2_5_vl").save_pretrained(tmp_path)
    assert inspect_checkpoint(tmp_path, dtype="float32").runtime == "transformers"
    assert HFTarget.load(tmp_path).trees


@pytest.mark.parametrize("family", ["megatron-bert", "cpmant"])
def test_a_model_whose_rows_see_what_follows_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="what follows a token changes"):
        HFTarget(build(family))


def test_the_doctor_refuses_an_encoder_without_flags_and_reads_layers_that_differ(tmp_path) -> None:
    build("megatron-bert").save_pretrained(tmp_path / "encoder")
    with pytest.raises(ConfigError, match="is an encoder"):
        inspect_checkpoint(tmp_path / "encoder", dtype="float32")
    build("gemma4_text").save_pretrained(tmp_path / "heads")
    assert inspect_checkpoint(tmp_path / "heads", dtype="float32").kv_bytes_per_token > 0
