"""The grown target of the image benchmark: larger, and the same distributions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from outrider.models.hf.fresh import small_llama

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TOKENS = torch.randint(0, 24, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import image_tokens  # type: ignore[import-not-found]

    monkeypatch.setattr(image_tokens, "LAYERS", 4)
    monkeypatch.setattr(image_tokens, "HEADS", 8)
    monkeypatch.setattr(image_tokens, "INNER", 208)
    return image_tokens


@pytest.fixture
def small(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = small_llama(24, 64, 2, 16, pad_token_id=None, bos_token_id=None, eos_token_id=None).bfloat16()
    model.save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "raster.json").write_text(json.dumps({"height": 3}))
    return tmp_path / "small"


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_a_grown_target_has_the_distributions_of_the_small_one(benchmark, small: Path, tmp_path: Path) -> None:
    big = benchmark.grow(small, tmp_path / "big")
    config = json.loads((big / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["intermediate_size"]) == (4, 8, 208)
    count = [sum(t.numel() for t in load_file(f / "model.safetensors").values()) for f in (small, big)]
    assert count[1] > 20 * count[0]
    torch.testing.assert_close(logits_of(big), logits_of(small), rtol=1e-4, atol=1e-4)
    assert (big / "raster.json").read_text() == (small / "raster.json").read_text()


def test_what_was_added_is_no_constant_that_a_kernel_could_skip(benchmark, small: Path, tmp_path: Path) -> None:
    weights = load_file(benchmark.grow(small, tmp_path / "big") / "model.safetensors")
    added = [w for name, w in weights.items() if ".layers.3." in name and name.split(".")[-2] in benchmark.READ]
    assert len(added) == len(benchmark.READ)
    assert all((w != 0).float().mean() > 0.99 and w.float().std() > 0.001 for w in added)
