"""Rows that a drafter puts aside while nothing is drafted, and reads together later."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters import context
from outrider.drafters.eagle.drafter import EagleDrafter
from outrider.nn.drafts import Rows
from outrider.params import SamplingParams
from outrider.types import Draft, Evidence
from outrider.verify import load_rule
from tests.drafters.drafting import Pausing, Seen, check_parity
from tests.drafters.networks import TARGET, feature_model
from tests.drafters.test_drafters_learned import GROWTHS, decode, states


def test_rows_that_wait_are_in_the_memory_that_a_drafter_asks_for() -> None:
    """As many as may wait in every slot, with the hidden states of every layer that is read; one more row is read at once."""
    held = [0]

    class Weighing(EagleDrafter):
        def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
            found = super().draft(evidence, budget)
            held[0] = max(held[0], self.backlog.bytes)
            return found

    drafter = Weighing(feature_model(), GROWTHS["chain"]())
    engine = Engine(TARGET, drafter, load_rule("speculative_sampling"), Fixed(0), slots=3, max_length=100, eos=())
    engine.generate([[1], [2], [3]], [SamplingParams(max_tokens=context.MOST_HELD + 5, seed=i) for i in range(3)])
    assert drafter.cache_need(3, 100).fixed == drafter.cache.bytes + held[0]


@pytest.mark.parametrize("most", [0, 3, 64])
def test_rows_that_wait_while_nothing_is_drafted_are_read_as_the_others(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts behind pauses have the logits of training, and if rows may wait fewer passes read them than there are steps."""
    monkeypatch.setattr(context, "MOST_HELD", most)
    passes = [0]

    class Counting(EagleDrafter):
        def read_further(self, rows: Rows, state: torch.Tensor) -> None:
            passes[0] += 1

    model, seen = feature_model(), Seen(GROWTHS["chain"]())
    drafter = Counting(model, seen)
    pausing = Pausing()
    decode(drafter, 2, control=pausing)
    assert len(seen.logits) > 20
    check_parity(model, seen, states)
    assert (passes[0] < 0.6 * pausing.steps) == (most > 0), (passes[0], pausing.steps)
    assert all(drafter.backlog.count(slot) == 0 for slot in range(2)), "released"
