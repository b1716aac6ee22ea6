"""Folders of learned drafters: what is written is read, layouts of others too, by every spec; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.drafters.eagle.eagle3 import Eagle3Network
from outrider.drafters.eagle.network import EagleConfig
from outrider.drafters.medusa.format import MedusaConfig
from outrider.drafters.medusa.network import MedusaNetwork
from outrider.drafters.registry import load_drafter
from outrider.errors import CapabilityError, ConfigError
from outrider.models.load import load_target
from outrider.models.toy import TinyLM
from tests.checkpoints import make_checkpoint
from tests.drafters.networks import TAPS, TARGET, H, V, feature_model, heads
from tests.plain_text import assert_plain_text


def test_round_trips(tmp_path: Path) -> None:
    """What is written is read again, rounded to bfloat16 and not otherwise; one more trip changes nothing."""
    for number, model in enumerate((feature_model(2, True), heads(True), heads(False))):
        folder, again = tmp_path / f"{number}", tmp_path / f"{number}-again"
        model.save(folder)
        read = type(model).load(folder, TARGET)
        assert read.config == model.config
        for name, value in model.state_dict().items():
            assert torch.equal(read.state_dict()[name], value.bfloat16().float())
        read.save(again)
        assert (folder / "config.json").read_text() == (again / "config.json").read_text()
        for name, value in load_file(folder / "model.safetensors").items():
            assert torch.equal(load_file(again / "model.safetensors")[name], value)


def test_names_and_fields_of_the_layouts(tmp_path: Path) -> None:
    """Tensor names and configuration keys are those that other programs look for."""
    feature_model().save(tmp_path / "eagle", "some/target")
    names = set(load_file(tmp_path / "eagle" / "model.safetensors"))
    layer = "layers.0."
    assert names == {
        "embed_tokens.weight", "fc.weight", "norm.weight", "lm_head.weight",
        *(f"{layer}{n}.weight" for n in ("hidden_norm", "input_layernorm", "post_attention_layernorm")),
        *(f"{layer}self_attn.{n}_proj.weight" for n in "qkvo"),
        *(f"{layer}mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
    }  # fmt: skip
    config = json.loads((tmp_path / "eagle" / "config.json").read_text())
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == "eagle3"
    assert config["speculators_config"]["verifier"]["name_or_path"] == "some/target"
    assert config["eagle_aux_hidden_state_layer_ids"] == list(TAPS)
    assert config["norm_before_residual"] is False
    assert config["transformer_layer_config"]["model_type"] == "llama"
    heads(True).save(tmp_path / "medusa")
    names = set(load_file(tmp_path / "medusa" / "model.safetensors"))
    blocks = {f"blocks.{h}.layers.{j}.{n}" for h in range(4) for j in range(2) for n in ("weight", "bias")}
    assert names == blocks | {"lm_heads.0.weight", "norm.weight"}


def test_layouts_of_others_are_read(tmp_path: Path) -> None:
    """EAGLE-3's own name for the layer; Medusa heads without biases and without the target's norm."""
    feature_model().save(tmp_path / "eagle")
    path = tmp_path / "eagle" / "model.safetensors"
    save_file({n.replace("layers.0.", "midlayer."): t for n, t in load_file(path).items()}, path)
    assert Eagle3Network.load(tmp_path / "eagle", TARGET).config.taps == TAPS
    heads(True).save(tmp_path / "medusa")
    path, config = tmp_path / "medusa" / "model.safetensors", tmp_path / "medusa" / "config.json"
    kept = {n: t for n, t in load_file(path).items() if not n.endswith("bias") and n != "norm.weight"}
    save_file(kept, path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"medusa_fc_bias": False}))
    read = MedusaNetwork.load(tmp_path / "medusa", TARGET)
    torch.testing.assert_close(read.norm.weight, torch.ones(H))  # this target's norm has no weights
    assert not bool(read.blocks[0].layers[0].bias.any())  # type: ignore[index, union-attr]


@pytest.mark.parametrize("implementation", ["auto", "hf"])
def test_greedy_text_is_the_targets_on_both_targets(implementation: str, tmp_path: Path) -> None:
    """Chains and trees, several sequences, with hidden states of either target; the drafters are random, the text is not."""
    place = make_checkpoint(tmp_path / "target", "qwen3", tokenizer=True)
    torch.manual_seed(0)
    vocab = load_target(place, dtype="float32").vocab_size
    MedusaNetwork(MedusaConfig(48, vocab, 3, 3)).save(tmp_path / "medusa")
    Eagle3Network(EagleConfig(32, 48, (1, 3), vocab, 2, 1, 16, 64)).save(tmp_path / "eagle")
    drafts = ("medusa", "tree:2x2:medusa", "eagle", "dynamic:8:eagle")
    assert_plain_text(place, drafts, length=3, proposed=20, implementation=implementation)


def test_specs(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    heads().save(tmp_path / "medusa")
    feature_model().save(tmp_path / "eagle")

    def load(spec: str, length: int = 3, path: Path | None = tmp_path / "target"):
        return load_drafter(spec, target=TARGET, length=length, target_path=str(path) if path else None)

    assert (load("medusa").name, load("medusa", 9).max_depth) == ("medusa", 4)
    assert load(f"medusa:{tmp_path / 'medusa'}", path=None).layers == (3,)
    eagle = load("eagle")
    assert (eagle.layers, eagle.max_depth, eagle.trees) == (TAPS, 3, False)
    assert load("greedy:eagle").growth.sample == "greedy"
    assert load("tree:3x2:medusa").max_nodes == 9
    assert load("dynamic:12:eagle").max_nodes == 12
    assert load("dynamic:12x2:medusa", 4).growth.width == 2
    assert load("ngram+eagle").name == "ngram+eagle"
    with pytest.raises(ConfigError, match="companion"):
        load("medusa", path=None)
    with pytest.raises(ConfigError, match="dynamic:NODES"):
        load("dynamic:x:eagle")
    with pytest.raises(ConfigError, match="and medusa has"):
        load("tree:2x1x1x1x1:medusa", 5)


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    heads().save(tmp_path / "medusa")
    with pytest.raises(CapabilityError, match="of width 16 and 19 tokens"):
        MedusaNetwork.load(tmp_path / "medusa", TinyLM(V, 32, 3))
    with pytest.raises(CapabilityError, match="reads layers"):
        MedusaNetwork.load(tmp_path / "medusa", TinyLM(V, H, 2))
    with pytest.raises(ConfigError, match="of type 'medusa', not 'eagle3'"):
        Eagle3Network.load(tmp_path / "medusa", TARGET)
    with pytest.raises(ConfigError, match="holds no trained drafter"):
        MedusaNetwork.load(tmp_path, TARGET)
    path = tmp_path / "medusa" / "model.safetensors"
    whole = load_file(path)
    save_file({n: t for n, t in whole.items() if n != "lm_heads.0.weight"}, path)
    with pytest.raises(ConfigError, match="not those its"):
        MedusaNetwork.load(tmp_path / "medusa", TARGET)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ConfigError, match="cannot be read"):
        MedusaNetwork.load(tmp_path / "medusa", TARGET)
    (tmp_path / "medusa" / "config.json").write_text('{"model_type": "medusa", "hidden_size": -4}')
    save_file(whole, path)
    with pytest.raises(ConfigError, match="hidden_size must be"):
        MedusaNetwork.load(tmp_path / "medusa", TARGET)
