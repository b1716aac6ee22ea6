"""Kernels of a GPU that add in any order are allowed here: what must be equal is compared in float64."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _any_order():
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    yield
    torch.set_deterministic_debug_mode(before)
