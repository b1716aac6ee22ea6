"""What the examples of the documentation share."""

from __future__ import annotations

from functools import partial

import pytest

from outrider.evaluate.audit import answer


@pytest.fixture
def short_audits(monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit's look at the rule itself takes 200 texts instead of thousands, which no option says: that it is enough of them is
    asked elsewhere (tests/evaluate/test_audit.py)."""
    monkeypatch.setattr(answer, "joint_distribution", partial(answer.joint_distribution, sequences=200))
