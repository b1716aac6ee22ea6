"""Folders of transformers' own layout: loaded in a type, or refused in one line that says what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from outrider.errors import ConfigError
from outrider.models.hf.target import HFTarget
from outrider.types import Draft, Rows
from tests.models.hf_families import V, build, plain

PROMPT = [3, 4, 5, 6, 7, 8, 9, 10, 11]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(folder)
    return folder


def test_load(checkpoint: Any) -> None:
    target = HFTarget.load(checkpoint, dtype=torch.float64, max_length=48)
    assert (target.vocab_size, target.hidden_size, target.layers, target.max_length) == (V, 32, 3, 48)
    assert target.dtype == torch.float64
    assert target.path == "seam"
    assert target.trees
    assert target.rewinds
    reference = plain(build("llama", torch.float64), PROMPT)
    rows = Rows.assemble([0], [PROMPT], [0], Draft.empty(1))
    torch.testing.assert_close(target.forward(rows, target.new_kv(1, 16)).logits[0], reference, atol=1e-6, rtol=1e-6)


def test_absent_checkpoints_are_named(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        HFTarget.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json"):
        HFTarget.load(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "garbage", "pickle", "missing", "kind"])
def test_damaged_checkpoints_are_refused_in_one_line(checkpoint: Any, tmp_path: Any, damage: str) -> None:
    weights = tmp_path / "model.safetensors"
    config = (checkpoint / "config.json").read_text()
    if damage == "cut":
        weights.write_bytes((checkpoint / "model.safetensors").read_bytes()[:5000])
    elif damage == "garbage":
        weights.write_bytes(b"not safetensors at all")
    elif damage == "pickle":
        torch.save(build("llama").state_dict(), tmp_path / "pytorch_model.bin")
    elif damage == "missing":
        build("llama").save_pretrained(tmp_path)
        config = config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    else:
        config = config.replace('"model_type": "llama"', '"model_type": "no_such_model"')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError) as refused:
        HFTarget.load(tmp_path)
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)
