"""Rows that a drafter puts aside while nothing is drafted, and reads together later."""

from __future__ import annotations

import pytest
import torch

from outrider.drafters import context
from outrider.drafters.eagle.drafter import EagleDrafter
from outrider.nn.drafts import Rows
from tests.drafters.drafting import Pausing, Seen, check_parity
from tests.drafters.test_drafters_learned import GROWTHS, decode, feature_model, states


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
