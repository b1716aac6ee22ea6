"""What we write is what the `speculators` package reads: its EAGLE-3 model on our folder gives our logits.

Skipped where the package is not installed; it is no dependency of ours. `benchmarks/README.md` says how to make an environment
that has both.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from outrider.assets import shipped
from outrider.drafters.eagle.eagle3 import Eagle3Network
from outrider.drafters.eagle.network import EagleConfig

LENGTH, STEPS = 20, 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", [False, True], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("residual", [False, True])
def test_the_speculators_package_computes_the_same_logits(residual: bool, part: bool, tmp_path: Path) -> None:
    """part: a drafter over every third token, by d2t and t2d. The shapes of the target are the shipped one's."""
    eagle3 = pytest.importorskip("speculators.models.eagle3")
    target = json.loads((shipped("target") / "config.json").read_text())
    wide, vocab, taps = target["hidden_size"], target["vocab_size"], (2, 9, 15)
    support = torch.arange(1, vocab, 3) if part else None
    torch.manual_seed(0)
    config = EagleConfig(
        wide, wide, taps, vocab, 6, 3, 48, 160, norm_before_residual=residual, draft_vocab=0 if support is None else len(support)
    )  # fmt: skip
    model = Eagle3Network(config, support).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_((p + 0.05 * torch.randn_like(p)).bfloat16().float())
    model.save(tmp_path, str(shipped("target")))
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    raw["transformer_layer_config"]["_attn_implementation"] = "eager"
    path.write_text(json.dumps(raw))
    theirs = eagle3.Eagle3DraftModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    theirs.config.transformer_layer_config._attn_implementation = "eager"
    assert list(theirs.target_layer_ids) == list(taps)
    heard: list[torch.Tensor] = []
    theirs.lm_head.register_forward_hook(lambda m, a, out: heard.append(out.detach()))
    tokens, hidden = torch.randint(vocab, (1, LENGTH + STEPS + 1)), torch.randn(1, LENGTH, len(taps), wide)
    with torch.no_grad():
        theirs(hidden.flatten(2), tokens[:, 1 : LENGTH + 1], torch.zeros(1, LENGTH, dtype=torch.long), ttt_steps=STEPS)
    ours = model.unroll(tokens, hidden, STEPS)
    for s in range(STEPS):
        fine = LENGTH - s  # they have no token behind the last ones
        mine = ours[s][0, :fine] if support is None else ours[s][0, :fine][:, support]
        torch.testing.assert_close(heard[s][0, :fine], mine, rtol=1e-3, atol=1e-3)
    if support is not None:
        drafted = torch.arange(len(support)) + theirs.d2t
        assert torch.equal(drafted, support), "both name the same tokens"
