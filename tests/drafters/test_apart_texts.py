"""Texts with drafters in a process of their own, which may be lost on the way.

Apart from test_apart.py, whose calls are checked for shapes and types in `make test`: these make the same calls thousands of times,
and are checked in `make test-slow`.
"""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest

from outrider.drafters.apart import Host
from tests.contract.drafters import host
from tests.drafters.failing import Failing
from tests.drafters.test_ahead import LENGTH, draft_model, run
from tests.drafters.test_apart import MAKERS, beside, plain


@pytest.mark.parametrize("kind", MAKERS)
def test_the_text_is_that_of_the_drafter_here(kind: str) -> None:
    """At any temperature, also when slots are used again, and by a second drafter of the same process."""
    drafter = beside(MAKERS[kind])
    for _ in range(2):
        texts, engine = run(drafter)
        assert (texts, engine.counts.accepted) == plain()
        assert not engine.notices
    assert drafter.pid == host().pid


@pytest.mark.parametrize("how", ["killed", "failing", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_lost_process_costs_nothing_but_speed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of texts. It is said once, no text differs, no step goes without drafts, and no process is left."""
    where = Host(2.0 if how == "stopped" else 60.0)
    drafter = beside(partial(Failing, draft_model(), LENGTH) if how == "failing" else MAKERS["ahead"], where)
    del where
    pid, steps, draft = drafter.pid, 0, drafter.draft
    assert pid is not None

    def counted(evidence, budget):
        nonlocal steps
        steps += 1
        if steps == 5 and how != "failing":
            os.kill(pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        return draft(evidence, budget)

    monkeypatch.setattr(drafter, "draft", counted)
    texts, engine = run(drafter)
    assert (texts, engine.counts.accepted) == plain()
    reason = {"killed": "ended with code -9", "stopped": "no answer within 2 s", "failing": "boom"}[how]
    assert [n for n in engine.notices if "process of their own" in n and reason in n] == engine.notices
    assert len(engine.notices) == 1
    assert engine.defects == 0
    assert drafter.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert run(drafter)[0] == plain()[0]
