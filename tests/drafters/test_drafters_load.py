"""Specs, vocabularies and vLLM's JSON: supported, or refused with the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outrider.drafters.combine import FirstOf
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.drafters.prediction import PredictedOutput
from outrider.drafters.registry import load_drafter, parse_speculative_config
from outrider.errors import CapabilityError, ConfigError
from outrider.models.toy import TinyLM
from outrider.protocols import Drafter
from outrider.verify import Match
from outrider.vocabulary import first_difference

MODEL, DRAFT = TinyLM(10), TinyLM(12, layers=1)


class Words:
    """A tokenizer as far as a vocabulary goes."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {w: i for i, w in enumerate(self.words) if w}


def load(spec: str, length: int = 4, **how) -> Drafter:
    return load_drafter(spec, target=MODEL, length=length, load_model=lambda name: (DRAFT, Words("a", "b")), **how)


def test_specs() -> None:
    assert isinstance(load("none"), NoDraft)
    assert isinstance(load("some/model", length=0), NoDraft)
    ngram = load("ngram")
    assert isinstance(ngram, NGram)
    assert ngram.max_depth == 4
    assert load("ngram:1-3").sizes == (1, 3)  # type: ignore[attr-defined]
    assert load("ngram:3").sizes == (3, 3)  # type: ignore[attr-defined]
    assert isinstance(load("prediction"), PredictedOutput)
    model = load("some/model")
    assert isinstance(model, ModelDrafter)
    assert (model.vocab_size, model.max_depth, model.growth.sample) == (10, 4, "sampled")
    both = load("ngram:2-3+prediction+some/model")
    assert isinstance(both, FirstOf)
    assert both.name == "ngram+prediction+model"
    assert load("greedy:some/model").growth.sample == "greedy"  # type: ignore[attr-defined]
    assert load("some/model", rule=Match()).growth.sample == "coupled"  # type: ignore[attr-defined]
    tree = load("ngram+tree:3x2:some/model")
    assert (tree.max_nodes, tree.max_depth, tree.trees) == (9, 4, True)


def test_auto_finds_the_draft_beside_the_target(tmp_path: Path) -> None:
    assert load("auto").name == "prediction+forced+ngram"
    (tmp_path / "target").mkdir()
    assert load("auto", target_path=str(tmp_path / "target")).name == "prediction+forced+ngram"
    (tmp_path / "draft").mkdir()
    asked: list[str] = []

    def loader(name: str) -> tuple[TinyLM, None]:
        asked.append(name)
        return DRAFT, None

    found = load_drafter("auto", target=MODEL, length=2, target_path=str(tmp_path / "target"), load_model=loader)
    assert found.name == "prediction+forced+model"
    assert asked == [str(tmp_path / "draft")]
    (tmp_path / "other").mkdir()
    assert load("auto", target_path=str(tmp_path / "other")).name == "prediction+forced+ngram"
    assert load("auto", target_path="target").name == "prediction+forced+ngram"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("ngrm", "did you mean 'ngram'"),
        ("stop:ngram", "takes no prefix: write 'ngram'"),
        ("suffix:x", "'suffix' has no option 'x': write 'suffix'"),
        ("prediction:", "'prediction' has no option '': write 'prediction'"),
        ("greedy:suffix", "takes no prefix: write 'suffix'"),
        ("ngram:", "ngram:MIN-MAX"),
        ("ngram:a", "ngram:MIN-MAX"),
        ("ngram:3-2", "min_n <= max_n"),
        ("ngram+", "missing"),
        ("ngram+none", "alone"),
        ("prediction+auto", "alone"),
        ("greedy:", "is not a draft model"),
        ("tree:3x2", "3x2x1"),
        ("tree:0x2:m", ">= 1"),
        ("tree:2x2x2x2x2:m", "raise the length"),
    ],
)
def test_bad_specs(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(spec)


def test_a_model_needs_a_loader_and_lengths_are_not_negative() -> None:
    with pytest.raises(ConfigError, match="load_model"):
        load_drafter("some/model", target=MODEL, length=2)
    with pytest.raises(ConfigError, match=">= 0"):
        load("ngram", length=-1)


def test_vocabularies() -> None:
    """Bug 22: an id that means two strings is refused by name; padding of either table is not."""
    assert isinstance(load("m/m", tokenizer=Words("a", "b", "c")), ModelDrafter)
    with pytest.raises(CapabilityError, match=r"token 1 is 'x' for the target and 'b' for the draft model 'm/m'"):
        load("m/m", tokenizer=Words("a", "x", "c"))
    assert first_difference(Words("a", "b", "").get_vocab(), Words("a", "b", "c").get_vocab(), 3) is None
    assert first_difference(Words("a", "b", "c").get_vocab(), Words("a", "b", "d").get_vocab(), 2) is None
    assert first_difference(Words("a", "c", "b").get_vocab(), Words("a", "b", "c").get_vocab(), 9) == (1, "c", "b")


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"model": "m"}, {"draft": "m"}),
        ({"method": "draft_model", "model": "m", "num_speculative_tokens": 5}, {"draft": "m", "length": 5}),
        ({"method": "ngram", "num_speculative_tokens": 3}, {"draft": "ngram:5-5", "length": 3}),
        ({"model": "ngram", "prompt_lookup_max": 4}, {"draft": "ngram:4-4"}),
        ({"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}, {"draft": "ngram:2-4"}),
        ({"model": "m", "draft_sample_method": "greedy"}, {"draft": "greedy:m"}),
        ({"model": "m", "draft_sample_method": "probabilistic"}, {"draft": "m"}),
        ({"model": "m", "rejection_sample_method": "standard"}, {"draft": "m", "rule": "speculative_sampling"}),
        ({"model": "m", "rejection_sample_method": "block"}, {"draft": "m", "rule": "block"}),
        ({"model": "m", "quantization": "int8"}, {"draft": "m", "draft_quantize": "int8"}),
        ({"model": "m", "draft_vocabulary": "auto"}, {"draft": "m", "draft_vocabulary": "auto"}),
        ({"model": "m", "draft_tensor_parallel_size": 1, "enforce_eager": True, "revision": None}, {"draft": "m"}),
    ],
)
def test_speculative_config(config: dict, options: dict) -> None:
    assert parse_speculative_config(config) == options
    assert parse_speculative_config(json.dumps(config)) == options
    load(options["draft"])


@pytest.mark.parametrize(("method", "ours"), [("medusa", "medusa"), ("eagle3", "eagle"), ("dflash", "dflash")])
def test_learned_methods_of_speculative_config(method: str, ours: str) -> None:
    """vLLM's names of drafters that were trained for a target; whether the folder holds one is found out when it is loaded."""
    config = {"method": method, "model": "a/folder", "num_speculative_tokens": 7}
    assert parse_speculative_config(config) == {"draft": f"{ours}:a/folder", "length": 7}
    greedy = parse_speculative_config(config | {"draft_sample_method": "greedy"})
    assert greedy == {"draft": f"greedy:{ours}:a/folder", "length": 7}
    with pytest.raises(ConfigError, match="holds no trained drafter"):
        load(greedy["draft"])


@pytest.mark.parametrize("method", ["mtp", "deepseek_mtp", "glm4_moe_mtp", "mimo_mtp", "qwen3_next_mtp"])
def test_methods_of_the_targets_own_head_need_no_model(method: str) -> None:
    config = {"method": method, "num_speculative_tokens": 3}
    assert parse_speculative_config(config) == {"draft": "mtp", "length": 3}
    assert parse_speculative_config(config | {"draft_sample_method": "greedy"})["draft"] == "greedy:mtp"
    assert parse_speculative_config(config | {"model": "a/folder"})["draft"] == "mtp:a/folder"
    with pytest.raises(ConfigError, match="no companion folder 'mtp', and its own carries none"):
        load("mtp")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "JSON object"),
        ({"modle": "m"}, "did you mean 'model'"),
        ({}, "needs 'model'"),
        ({"model": 3}, "path or a Hub name"),
        (
            {"method": "ernie_mtp", "model": "m"},
            "supported: draft_model, ngram, medusa, eagle, eagle3, dflash, mtp, deepseek_mtp",
        ),
        ({"method": "dflash"}, "needs 'model'"),
        ({"method": "dflash", "model": "m", "quantization": "int8"}, "has no effect for method 'dflash'"),
        ({"model": "m", "num_speculative_tokens": 0}, "whole number >= 1"),
        ({"model": "m", "num_speculative_tokens": True}, "whole number >= 1"),
        ({"model": "m", "num_speculative_tokens": "5"}, "whole number >= 1"),
        ({"model": "m", "draft_tensor_parallel_size": 2}, "only 1 is supported"),
        ({"model": "m", "draft_tensor_parallel_size": True}, "only 1 is supported"),
        ({"model": "m", "parallel_drafting": True}, "only false is supported"),
        ({"model": "m", "revision": "main"}, "remove it"),
        ({"model": "m", "rejection_sample_method": "fly"}, "supported: standard"),
        ({"model": "m", "draft_sample_method": "gumbel"}, "supported: greedy, probabilistic"),
        ({"model": "m", "prompt_lookup_max": 3}, "has no effect for method 'draft_model'"),
        ({"method": "ngram", "draft_sample_method": "greedy"}, "has no effect for method 'ngram'"),
        ({"method": "ngram", "model": "m"}, "remove one"),
        ({"method": "ngram", "prompt_lookup_min": 4, "prompt_lookup_max": 2}, "must be <="),
    ],
)
def test_speculative_config_refusals(config: dict | str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_speculative_config(config)
