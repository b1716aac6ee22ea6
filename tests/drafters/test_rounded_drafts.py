"""Trained drafters with matrices in blocks: the numbers are those of the rounded network, and have the same bits in any company."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from outrider.drafters.dflash.format import DFlashConfig
from outrider.drafters.dflash.forward import NativeForward as NativeBlock
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.drafters.eagle.eagle3 import Eagle3Network
from outrider.drafters.eagle.forward import NativeForward, TorchForward
from outrider.drafters.eagle.network import EagleConfig
from outrider.drafters.medusa.drafter import native
from outrider.drafters.medusa.format import MedusaConfig, SequentialConfig
from outrider.drafters.medusa.network import MedusaNetwork
from outrider.drafters.medusa.sequential import SequentialNetwork
from outrider.drafters.medusa.sequential_forward import NativeForward as NativeSequence
from outrider.drafters.spec import parse_draft
from outrider.models.quantised import rounding
from outrider.nn.blocks import dequantise
from tests.drafters.test_native_drafts import LIBRARY, ROOM, blocks, double, filled, some_levels, taps_for

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="compiled drafters need a C++ compiler")

V, WIDE, INNER = 101, 256, 512
TOLERANCE = 0.15
"""Of logits of a few nats. Inputs of products are rounded to a 254th of the largest of 32: about as much as bfloat16 rounds, see
`test_native_drafts`, and keys, values and what is beside blocks are bfloat16."""
TYPES = ("q8_0", "q4_k", "int8")
TABLES = ("embed_tokens", "token")
"""Rows of tokens, which nothing is multiplied with: they stay as they are."""


def rounded(model: Any, kind: str) -> Any:
    """The network with the values of its rounded matrices, in float64."""
    made, to = copy.deepcopy(model), rounding(kind)
    for name, p in made.named_parameters():
        if p.dim() == 2 and name.split(".")[0] not in TABLES:
            segment = to.segment(p.data.bfloat16(), "lm_head" in name)
            p.data = dequantise(segment.rows, segment.block)
    return double(made)


def features() -> Eagle3Network:
    return filled(Eagle3Network(EagleConfig(WIDE, WIDE, (1, 2), V, 4, 2, 16, INNER)))


def block_model() -> DFlashNetwork:
    return filled(DFlashNetwork(DFlashConfig(WIDE, (1, 3), V, 4, 2, 16, INNER, block=5, mask=V - 1, layers=2)))


@pytest.mark.parametrize("kind", TYPES)
def test_a_level_is_the_rounded_networks(kind: str, threads: None) -> None:
    model = features()
    taps, exact = taps_for(model, torch.bfloat16), rounded(model, kind)
    found = some_levels(NativeForward(LIBRARY, model, rounding=rounding(kind)), model, taps)
    for own, twin in zip(found, some_levels(TorchForward(exact, ROOM), exact, taps), strict=True):
        assert (own - twin).abs().max() < TOLERANCE < twin.std()


def test_rounding_is_seen() -> None:
    """Negative control: beside the network as it is, 4 bits are further away than the tolerance."""
    model = features()
    taps, exact = taps_for(model, torch.bfloat16), double(model)
    found = some_levels(NativeForward(LIBRARY, model, rounding=rounding("q4_k")), model, taps)
    assert (found[0] - some_levels(TorchForward(exact, ROOM), exact, taps)[0]).abs().max() > TOLERANCE


@pytest.mark.parametrize("kind", TYPES)
def test_a_block_is_the_rounded_networks(kind: str, threads: None) -> None:
    model = block_model()
    taps, exact = taps_for(model, torch.bfloat16), rounded(model, kind)
    run = NativeBlock(LIBRARY, model, rounding=rounding(kind))
    found = blocks(run, model, taps, [0, 2])
    for n, slot in enumerate((0, 2)):
        hidden = torch.stack([t[4 * slot : 4 * slot + 4].double() for t in taps], 1)[None]
        wanted = exact.blocks(exact.inject(hidden), torch.tensor([[7 + slot]]), torch.tensor([[4]]))[0, 0]
        assert (found[n] - wanted).abs().max() < TOLERANCE < wanted.std()
        assert torch.equal(blocks(run, model, taps, [slot])[0], found[n])  # the same bits alone


@pytest.mark.parametrize(("kind", "shared"), [(kind, shared) for kind in TYPES for shared in (True, False)])
def test_heads_are_the_rounded_networks(kind: str, shared: bool, threads: None) -> None:
    model: MedusaNetwork = filled(MedusaNetwork(MedusaConfig(WIDE, V, 4, 3, 2, shared)))
    state = torch.randn(5, WIDE, generator=torch.Generator().manual_seed(2))
    run = native(LIBRARY, model, 4, rounding=rounding(kind))
    found, wanted = run(state), rounded(model, kind)(state.double()).transpose(0, 1)
    assert (found - wanted).abs().max() < TOLERANCE < wanted.std()
    for i in range(5):
        assert torch.equal(run(state[i : i + 1])[:, 0], found[:, i])


@pytest.mark.parametrize("kind", TYPES)
def test_sequential_heads_are_the_rounded_networks(kind: str, threads: None) -> None:
    model: SequentialNetwork = filled(SequentialNetwork(SequentialConfig(WIDE, V, (1, 2), WIDE, INNER)))
    run, exact = NativeSequence(LIBRARY, model, rounding=rounding(kind)), rounded(model, kind)
    taps = torch.randn(2, 3, WIDE, generator=torch.Generator().manual_seed(2)).bfloat16()
    state, logits = run.forward([5, 6, 7], taps=taps)
    first = exact.unroll(torch.tensor([[0, t, 9] for t in (5, 6, 7)]), taps.double().permute(1, 0, 2)[:, None], 1)
    assert (logits - first[0][:, 0]).abs().max() < TOLERANCE < first[0].std()
    alone, one = run.forward([6], taps=taps[:, 1:2])
    assert torch.equal(one[0], logits[1]) and torch.equal(alone[0], state[1])
    together, nexts = run.forward([9, 9, 9], state=state)
    for i in range(3):
        own, last = run.forward([9], state=state[i : i + 1])
        assert torch.equal(own[0], together[i]) and torch.equal(last[0], nexts[i])


def test_what_the_compiled_decoder_does_not_run_is_not_called_rounded() -> None:
    """So that a notice says that the option does nothing: of heads of another shape, and of weights that it does not take."""
    to = rounding("q8_0")
    spec = replace(parse_draft("eagle", 3, "sampled"), rounding=to)
    assert spec.rounding_for(torch.ones(1), fits=False) is None
    assert spec.rounding_for(torch.ones(1).double()) is None and not to.used
    assert spec.rounding_for(torch.ones(1)) is to and to.used


def test_rows_that_fill_no_blocks_stay_as_they_are() -> None:
    """The bits of the network that is not rounded, where no matrix can be."""
    model: MedusaNetwork = filled(MedusaNetwork(MedusaConfig(40, V, 2, 3, 1, True)))
    state = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(native(LIBRARY, model, 2, rounding=rounding("q8_0"))(state), native(LIBRARY, model, 2)(state))
