"""Every method's loss stays on the device of its model, checked without another device: tensors of PyTorch's `meta` have no
numbers, and each operation on two devices is refused as on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from outrider.drafters.dflash.format import DFlashConfig
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.drafters.eagle.eagle1 import Eagle1Network
from outrider.drafters.eagle.eagle3 import Eagle3Network
from outrider.drafters.eagle.network import EagleConfig
from outrider.drafters.medusa.format import MedusaConfig, SequentialConfig
from outrider.drafters.medusa.network import MedusaNetwork
from outrider.drafters.medusa.sequential import SequentialNetwork
from outrider.drafters.mtp.network import MtpConfig, MtpNetwork
from outrider.train.distill import Teacher
from outrider.train.features import Features
from outrider.train.job import Job
from outrider.train.loop import LoopConfig
from outrider.train.methods.registry import METHODS, method_named

WIDE, VOCAB, LENGTH, ROWS, LEVELS = 32, 40, 24, 3, 3
LAYERS = (1, 2)
NETWORKS = {
    "medusa": lambda: MedusaNetwork(MedusaConfig(WIDE, VOCAB, LEVELS, 2)),
    "hydra": lambda: SequentialNetwork(SequentialConfig(WIDE, VOCAB, LAYERS, 24, 64)),
    "eagle": lambda: Eagle3Network(EagleConfig(32, WIDE, LAYERS, VOCAB, 2, 1, 16, 64)),
    "eagle1": lambda: Eagle1Network(EagleConfig(WIDE, WIDE, (2,), VOCAB, 2, 1, 16, 64)),
    "mtp": lambda: MtpNetwork(MtpConfig(WIDE, WIDE, (2,), VOCAB, 2, 1, 16, 64)),
    "dflash": lambda: DFlashNetwork(
        DFlashConfig(WIDE, LAYERS, VOCAB, heads=2, kv_heads=1, head_dim=16, inner=64, block=LEVELS + 1, mask=VOCAB - 1)
    ),
}
"""A draft model is transformers' own, and reads tokens alone."""


def elsewhere(model: nn.Module, device: str) -> nn.Module:
    """The model with parameters and buffers on the device."""
    for part in model.modules():
        for held, make in ((part._parameters, nn.Parameter), (part._buffers, lambda x: x)):
            for name, value in held.items():
                if value is not None:
                    held[name] = make(torch.empty(value.shape, dtype=value.dtype, device=device))
    return model


def data(device: str) -> Features:
    """Rows whose hidden states are held on the device."""
    tokens = np.zeros((8, LENGTH), dtype=np.uint16)
    hidden = torch.empty(8, LENGTH, len(LAYERS), WIDE, dtype=torch.float16, device=device)
    return Held(tokens, hidden, LAYERS, ROWS, 0, torch.device(device))


class Held(Features):
    """The same, but ids are made on the device."""

    def take(self, chosen: Any) -> Any:
        rows = len(chosen)
        tokens = torch.zeros(rows, LENGTH, dtype=torch.int64, device=self.device)
        return tokens, self.hidden[:rows].float()  # type: ignore[union-attr]


def job(kind: str) -> Job:
    return Job(
        kind=kind, target="", data=(), work="", out="", levels=LEVELS, length=LENGTH, prompt=4, batch=ROWS,  # type: ignore[arg-type]
        loop=LoopConfig(steps=1, lr=1e-3),
    )  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", sorted(NETWORKS))
def test_a_step_of_training_stays_on_one_device(kind: str, device: str) -> None:
    method, model = method_named(kind), elsewhere(NETWORKS[kind](), device)
    features, head = data(device), torch.empty(WIDE, VOCAB, device=device)
    target: Any = SimpleNamespace(dtype=torch.float32, unembed=lambda x: x @ head, layers=2, device=features.device)
    judge = Teacher.of(target, LAYERS, tuple(model.config.taps) if hasattr(model.config, "taps") else (2,))
    batches, loss = method.fit_inputs(job(kind), judge, model, features)
    found = loss(model, batches(0), 0.9)
    assert found.device == features.device
    found.backward()
    learnt = [p.grad for p in model.parameters() if p.grad is not None]
    assert learnt and all(gradient.device == features.device for gradient in learnt)


def test_two_devices_are_refused() -> None:
    """The control: hidden states that stayed behind."""
    model = elsewhere(NETWORKS["medusa"](), "meta")
    with pytest.raises(RuntimeError, match="device"):
        model(torch.zeros(ROWS, LENGTH, WIDE))


def test_every_method_with_a_network_of_ours_is_here() -> None:
    assert set(NETWORKS) | {"draft"} == set(METHODS)
