"""Keys of GGUF files that say which layers have a window and what these turn their heads by, as llama.cpp reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.errors import ConfigError
from outrider.models.gguf import checkpoint
from outrider.models.gguf.checkpoint import GgufCheckpoint
from outrider.models.gguf.weights import Weights
from tests.gguf_files import make_pair

MADE: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "layer_types": None},
    "gpt_oss": {"swiglu_limit": 7.0},
    "phi3": {"sliding_window": 6},
}
NAMES = {"gemma3_text": "gemma3", "gpt_oss": "gpt-oss"}
PATTERN, BASE = "attention.sliding_window_pattern", "rope.freq_base_swa"


def read(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> GgufCheckpoint:
    """A file of a family of four layers with other values of keys; None: without the key."""
    file = folder / "model.gguf"
    if not file.exists():
        make_pair(folder, family, num_hidden_layers=4, **MADE[family])

    def changed(path: Path) -> Weights:
        weights = Weights(path)
        for key, value in changes.items():
            weights.values[f"{NAMES.get(family, family)}.{key}"] = value  # type: ignore[index]
        return weights

    monkeypatch.setattr(checkpoint, "Weights", changed)
    return GgufCheckpoint(file)


@pytest.mark.parametrize(("family", "width"), [("gemma2", 5), ("gemma3_text", 5), ("gpt_oss", 5)])
def test_layers_with_a_window(family: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number: of so many layers the last one has none, 0: all have one (`set_swa_pattern`). A list says it of each."""
    w, usual = width, {"gemma2": [5, 0, 5, 0], "gemma3_text": [5, 5, 5, 5], "gpt_oss": [5, 0, 5, 0]}[family]
    wanted = {
        3: [w, w, 0, w], 1: [0] * 4, 0: [w] * 4, 2: [w, 0, w, 0], (True, True, False, False): [w, w, 0, 0],
        (0, 1, 1, 1): [0, w, w, w],
    }  # fmt: skip
    assert list(read(family, tmp_path, monkeypatch).config.window) == usual
    for given, windows in wanted.items():
        assert list(read(family, tmp_path, monkeypatch, **{PATTERN: given}).config.window) == windows, given
    for wrong, said in ((True, "must be a number"), ("2", "must be a number"), ((True,) * 3, "is of 3 layers, not 4")):
        with pytest.raises(ConfigError, match=f"{PATTERN} {said}"):
            read(family, tmp_path, monkeypatch, **{PATTERN: wrong})


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_one_base_is_said_twice_or_refused(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = read(family, tmp_path, monkeypatch)
    base = own.weights.values[f"{NAMES.get(family, family)}.rope.freq_base"]
    same = read(family, tmp_path, monkeypatch, **{BASE: base})
    assert same.raw == own.raw and torch.equal(same.config.inv_freq, own.config.inv_freq)
    with pytest.raises(ConfigError, match=f"{BASE} 77 where all its layers turn by"):
        read(family, tmp_path, monkeypatch, **{BASE: 77.0})


def test_layers_with_a_window_turn_by_their_own_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read("gemma3_text", tmp_path, monkeypatch, **{BASE: 77.0}).config
    size = found.head_dim
    assert found.local_freq is not None
    torch.testing.assert_close(found.local_freq, 77.0 ** -(torch.arange(0, size, 2) / size).to(found.local_freq))


def test_windows_of_phi3_are_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layer, as transformers reads its configuration; llama.cpp leaves them out. 0 is Phi-4's: none."""
    assert list(read("phi3", tmp_path, monkeypatch).config.window) == [6] * 4
    assert list(read("phi3", tmp_path, monkeypatch, **{"attention.sliding_window": 0}).config.window) == [0] * 4
