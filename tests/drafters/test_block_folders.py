"""Folders of block drafters: names and fields, tables, texts on both targets, specs, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.build import build_engine
from outrider.drafters.dflash.format import DFlashConfig
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.drafters.registry import load_drafter
from outrider.errors import CapabilityError, ConfigError
from tests.checkpoints import make_checkpoint
from tests.drafters.test_drafters_block import BLOCK, TAPS, TARGET, V, block_model
from tests.plain_text import assert_plain_text


def test_round_trip(tmp_path: Path) -> None:
    """What is written is read again, rounded to bfloat16 and not otherwise; one more trip changes nothing."""
    model = block_model(2)
    model.save(tmp_path / "a", tables=True)
    read = DFlashNetwork.load(tmp_path / "a", TARGET)
    assert read.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], value.bfloat16().float())
    read.save(tmp_path / "b", tables=True)
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()
    again = load_file(tmp_path / "b" / "model.safetensors")
    for name, value in load_file(tmp_path / "a" / "model.safetensors").items():
        assert torch.equal(again[name], value)


def test_names_and_fields_of_the_layout(tmp_path: Path) -> None:
    """Tensor names and configuration keys are those that other programs look for; the target's tables are not written."""
    block_model(1, 2).save(tmp_path, "some/target")
    assert set(load_file(tmp_path / "model.safetensors")) == {
        "fc.weight", "hidden_norm.weight", "norm.weight",
        *(f"layers.{i}.{n}.weight" for i in range(2) for n in ("input_layernorm", "post_attention_layernorm")),
        *(f"layers.{i}.self_attn.{n}.weight" for i in range(2) for n in ("q_norm", "k_norm")),
        *(f"layers.{i}.self_attn.{n}_proj.weight" for i in range(2) for n in "qkvo"),
        *(f"layers.{i}.mlp.{n}_proj.weight" for i in range(2) for n in ("gate", "up", "down")),
    }  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == "dflash"
    assert (
        config["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
        == BLOCK - 1
        == config["block_size"] - 1
    )
    assert config["speculators_config"]["verifier"]["name_or_path"] == "some/target"
    assert config["aux_hidden_state_layer_ids"] == list(TAPS)
    assert (config["mask_token_id"], config["sample_from_anchor"]) == (V - 1, False)
    assert config["sliding_window_non_causal"] is True, "without it vLLM serves the block causally"
    assert config["transformer_layer_config"]["layer_types"] == ["full_attention"] * 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("implementation", ["auto", "hf"])
def test_tables_are_the_targets(tied: bool, implementation: str, tmp_path: Path) -> None:
    """A folder without tables takes the target's: its embeddings, and its head, with or without its folder."""
    place = make_checkpoint(tmp_path / "target", "llama", tokenizer=True, tie_word_embeddings=tied)
    one = build_engine(place, "none", dtype="float32", implementation=implementation)
    target, wide = one.parts.target, 48
    torch.manual_seed(0)
    model = DFlashNetwork(DFlashConfig(wide, (1, 2), target.vocab_size, 3, 3, 16, 64, 5, mask=0))
    model.save(tmp_path / "dflash")
    raw = load_file(place / "model.safetensors")
    read = DFlashNetwork.load(tmp_path / "dflash", target, str(place))
    torch.testing.assert_close(read.embed_tokens.weight, raw["model.embed_tokens.weight"])
    torch.testing.assert_close(read.lm_head.weight, raw["model.embed_tokens.weight" if tied else "lm_head.weight"])
    torch.testing.assert_close(DFlashNetwork.load(tmp_path / "dflash", target).lm_head.weight, read.lm_head.weight)


@pytest.mark.parametrize("implementation", ["auto", "hf"])
def test_greedy_text_is_the_targets_on_both_targets(implementation: str, tmp_path: Path) -> None:
    """Chains and trees, one sequence and three, with hidden states of either target; the drafter is random, the text is not."""
    place = make_checkpoint(tmp_path / "target", "qwen3", tokenizer=True)
    torch.manual_seed(0)
    DFlashNetwork(DFlashConfig(48, (1, 3), 260, 3, 1, 16, 64, 5, mask=0)).save(tmp_path / "dflash")
    drafts = ("dflash", "greedy:dflash", "dynamic:8:dflash")
    assert_plain_text(place, drafts, tokens=14, length=4, proposed=30, implementation=implementation)


def test_specs(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    block_model().save(tmp_path / "dflash", tables=True)

    def load(spec: str, length: int = 3, path: Path | None = tmp_path / "target"):
        return load_drafter(spec, target=TARGET, length=length, target_path=str(path) if path else None)

    made = load("dflash")
    assert (made.name, made.layers, made.max_depth, made.trees) == ("dflash", TAPS, 3, False)
    assert load("dflash", 9).max_depth == BLOCK - 1, "a longer draft is not to be had"
    assert load(f"dflash:{tmp_path / 'dflash'}", 2, None).max_depth == 2
    assert load("greedy:dflash").growth.sample == "greedy"  # type: ignore[attr-defined]
    tree = load("dynamic:6x3:dflash", 9)
    assert (tree.max_nodes, tree.max_depth, tree.trees) == (6, BLOCK - 1, True)
    assert load("ngram+dflash").max_depth == 3
    with pytest.raises(ConfigError, match="companion folder"):
        load("dflash", path=None)
    with pytest.raises(ConfigError, match="not 'eagle3'"):
        load(f"eagle:{tmp_path / 'dflash'}")


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    block_model().save(tmp_path, tables=True)
    path = tmp_path / "config.json"
    fine = json.loads(path.read_text())
    shape = fine["transformer_layer_config"]
    wrong = [
        ({"sample_from_anchor": True}, ConfigError, "sample_from_anchor"),
        ({"draft_vocab_size": 5}, ConfigError, "reduced draft vocabulary"),
        ({"block_size": 10**9}, ConfigError, "block_size"),
        ({"block_size": 1}, ConfigError, "at least 2 slots"),
        ({"mask_token_id": None}, ConfigError, "mask_token_id"),
        ({"mask_token_id": V}, ConfigError, "mask token"),
        ({"aux_hidden_state_layer_ids": "1,3"}, ConfigError, "aux_hidden_state_layer_ids"),
        ({"aux_hidden_state_layer_ids": [1, 9]}, CapabilityError, "reads layers"),
        ({"transformer_layer_config": shape | {"layer_types": ["sliding_attention"] * 2}}, ConfigError, "sliding"),
        ({"transformer_layer_config": shape | {"attention_bias": True}}, ConfigError, "attention_bias"),
        ({"transformer_layer_config": shape | {"hidden_size": 32}}, CapabilityError, "width 32"),
        ({"transformer_layer_config": shape | {"intermediate_size": 21}}, ConfigError, "tensors"),
        ({"transformer_layer_config": shape | {"rope_parameters": {"rope_type": "yarn"}}}, ConfigError, "yarn"),
    ]
    for change, error, said in wrong:
        path.write_text(json.dumps(fine | change))
        with pytest.raises(error, match=said):
            DFlashNetwork.load(tmp_path, TARGET)
    path.write_text(json.dumps(fine))
    weights = tmp_path / "model.safetensors"
    save_file({n: t for n, t in load_file(weights).items() if n != "fc.weight"}, weights)
    with pytest.raises(ConfigError, match="fc.weight"):
        DFlashNetwork.load(tmp_path, TARGET)
