"""Mixtures of experts in GGUF files: numbers of transformers on the files' values, and the same bits and texts in any company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from outrider.models.load import load_target
from outrider.models.native.build import load_library
from outrider.types import Draft, Rows
from tests.mixture_files import rounded, small, write

pytest.importorskip("gguf")
FAMILIES = ("qwen3_moe", "mixtral", "olmoe")
TEXT = torch.randint(101, (40,), generator=torch.Generator().manual_seed(3)).tolist()


def logits(target, text: list[int]) -> torch.Tensor:
    """Of every row of a text."""
    rows = Rows.assemble([0], [text], [0], Draft.empty(1))
    scored = rows.__class__(**{f: getattr(rows, f) for f in rows.__dataclass_fields__} | {"scored": torch.arange(len(text))})
    return target.forward(scored, target.new_kv(1, len(text))).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_values_of_a_file_are_those_of_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(family)
    file = write(model, tmp_path / "x.gguf")
    with torch.no_grad():
        expected = rounded(model)(torch.tensor([TEXT])).logits[0]
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")
    found = logits(load_target(file, dtype="float32"), TEXT)
    print((found - expected).abs().max(), expected.std())
    monkeypatch.delenv("OUTRIDER_NATIVE")
    if load_library() is not None:
        q = logits(load_target(file, dtype="float32"), TEXT)
        p, r = expected.double().log_softmax(-1), q.double().log_softmax(-1)
        print("kl", (p.exp() * (p - r)).sum(-1).mean(), "tv", (p.exp() - r.exp()).abs().sum(-1).mean() / 2)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.std()))
