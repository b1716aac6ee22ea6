"""Small learned drafters with random weights, and the toy target that they stand on."""

from __future__ import annotations

from functools import cache

import torch

from outrider.drafters.eagle.eagle3 import Eagle3Network
from outrider.drafters.eagle.network import EagleConfig
from outrider.drafters.medusa.format import MedusaConfig
from outrider.drafters.medusa.network import MedusaNetwork
from outrider.models.toy import TinyLM

V, H = 19, 16
TARGET = TinyLM(V, H, 3, seed=1, sharp=3.0)
TAPS = (1, 3)


@cache
def feature_model(kv_heads: int = 1, norm_before_residual: bool = False) -> Eagle3Network:
    torch.manual_seed(3)
    config = EagleConfig(12, H, TAPS, V, 2, kv_heads, 6, 20, norm_before_residual=norm_before_residual)
    model = Eagle3Network(config).double().eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.5)
    return model


@cache
def heads(shared: bool = True, blocks: int = 2) -> MedusaNetwork:
    torch.manual_seed(4)
    model = MedusaNetwork(MedusaConfig(H, V, 4, 3, blocks, shared)).double().eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.5)
    return model
