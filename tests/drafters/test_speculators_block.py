"""What we write is what the `speculators` package reads: its DFlash model on our folder gives our logits, packed blocks and all.

Skipped where the package is not installed; it is no dependency of ours.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from outrider.build import build_engine
from outrider.drafters.dflash.format import DFlashConfig
from outrider.drafters.dflash.network import DFlashNetwork
from tests.checkpoints import make_checkpoint

WIDE, TAPS, LENGTH, BLOCK = 48, (1, 3), 24, 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [3, 1])
def test_the_speculators_package_computes_the_same_logits(kv_heads: int, tied: bool, tmp_path: Path) -> None:
    """Two texts in a row, five blocks that overlap; the tables are the target's in both programs."""
    dflash = pytest.importorskip("speculators.models.dflash")
    place = make_checkpoint(tmp_path / "target", "llama", tokenizer=True, tie_word_embeddings=tied)
    target = build_engine(place, "none", dtype="float32").parts.target
    torch.manual_seed(0)
    config = DFlashConfig(WIDE, TAPS, target.vocab_size, 3, kv_heads, 16, 64, BLOCK, mask=0, layers=2)
    fresh = DFlashNetwork(config).requires_grad_(False)
    for p in fresh.parameters():
        p.copy_(p + 0.2 * torch.randn_like(p))
    fresh.save(tmp_path / "dflash", str(place))
    model = DFlashNetwork.load(tmp_path / "dflash", target, str(place))

    path = tmp_path / "dflash" / "config.json"
    raw = json.loads(path.read_text())
    raw["transformer_layer_config"]["_attn_implementation"] = "eager"
    path.write_text(json.dumps(raw))
    theirs = dflash.DFlashDraftModel.from_pretrained(tmp_path / "dflash", dtype=torch.float32).eval()
    assert list(theirs.target_layer_ids) == list(TAPS)
    assert (theirs.block_size, theirs.mask_token_id) == (BLOCK, 0)

    anchors = torch.tensor([[2, 3, 5, 14, 18]])
    wanted = torch.zeros(1, LENGTH)
    wanted[0, anchors[0]] = 1.0
    tokens, taps = torch.randint(target.vocab_size, (1, LENGTH)), torch.randn(1, LENGTH, len(TAPS), WIDE)
    document = torch.tensor([[0] * 10 + [1] * 14])
    with torch.no_grad():
        _, found, *_ = theirs._backbone_forward(
            taps.flatten(2), tokens, wanted, torch.randn(1, LENGTH, WIDE), document, max_anchors=5
        )
        ours = model.blocks(model.inject(taps), tokens.gather(1, anchors), anchors, document=document)
    found = found.view(1, 5, BLOCK, -1)[:, :, 1:]
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)
