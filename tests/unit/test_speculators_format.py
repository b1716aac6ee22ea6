"""What we write is what the `speculators` package reads: its EAGLE-3 model on our folder gives our logits.

Skipped where the package is not installed; it is no dependency of ours.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from outrider.assets import shipped
from outrider.drafters.feature import FeatureConfig, FeatureModel

H, V, TAPS, LENGTH, STEPS = 288, 2048, (2, 9, 15), 20, 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("residual", [False, True])
def test_the_speculators_package_computes_the_same_logits(residual: bool, tmp_path: Path) -> None:
    eagle3 = pytest.importorskip("speculators.models.eagle3")
    torch.manual_seed(0)
    config = FeatureConfig(H, H, TAPS, V, 6, 3, 48, 160, norm_before_residual=residual)
    model = FeatureModel(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_((p + 0.05 * torch.randn_like(p)).bfloat16().float())
    model.save(tmp_path, str(shipped("target")))
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    raw["transformer_layer_config"]["_attn_implementation"] = "eager"
    path.write_text(json.dumps(raw))
    theirs = eagle3.Eagle3DraftModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    theirs.config.transformer_layer_config._attn_implementation = "eager"
    assert list(theirs.target_layer_ids) == list(TAPS)
    heard: list[torch.Tensor] = []
    theirs.lm_head.register_forward_hook(lambda m, a, out: heard.append(out.detach()))
    tokens, taps = torch.randint(V, (1, LENGTH + STEPS + 1)), torch.randn(1, LENGTH, len(TAPS), H)
    with torch.no_grad():
        theirs(taps.flatten(2), tokens[:, 1 : LENGTH + 1], torch.zeros(1, LENGTH, dtype=torch.long), ttt_steps=STEPS)
    ours = model.unroll(tokens, taps, STEPS)
    for s in range(STEPS):
        fine = LENGTH - s  # they have no token behind the last ones
        torch.testing.assert_close(heard[s][0, :fine], ours[s][0, :fine], rtol=1e-3, atol=1e-3)
