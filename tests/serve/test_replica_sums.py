"""Sums over replicas never fall, whichever count on, start again or are not heard of for a while."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.serve.replicas.sums import Sums
from tests.serve.test_replicas import sample


def reading(uptime: float, emitted: int, pid: int) -> tuple[dict[str, Any], str]:
    """What a replica says; only what the sums read."""
    now = {
        "t": 1.0,
        "emitted": emitted,
        "sequence_steps": emitted,
        "running": 1,
        "waiting": 0,
        "length": 2,
        "speedup": 1.0,
    }
    now |= {"judged": 0, "accepted": 0, "rejected": 0, "risk": 0.0, "spread": 0.0, "bias": 0.0, "failed": 0}
    now |= {"evidence": {"judged": emitted, "rejected": emitted, "risk": float(emitted), "spread": 0.0}}
    server = {"uptime": uptime, "pid": pid, "ready": True, "slots": 2, "queue": 3}
    state = {"server": server, "now": now, "positions": {"judged": [emitted], "accepted": []}, "outcomes": {"stop": 1}}
    state |= {"refused": {}, "ledger": {"agrees": True, "log_evidence": 0.0}, "alerts": [], "requests": []}
    state |= {"resources": {"memory": 5, "kv": 0.5}}
    text = f'# TYPE tokens_total counter\ntokens_total{{model="a\\"b"}} {emitted}\n# TYPE load gauge\nload 1.0\n'
    return state, text


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 50), st.booleans()), max_size=20))
def test_a_sum_never_falls_and_is_what_was_counted(steps: list[tuple[str, int, bool]]) -> None:
    """Replicas count on, start again from 0, and are not heard of for a while, in either case."""
    sums, uptime, counted, total, last = Sums(), {"a": 1.0, "b": 1.0}, {"a": 0, "b": 0}, 0, 0.0
    pids = {"a": 0, "b": 0}
    for name, more, again in steps:
        if again:
            uptime[name], counted[name], pids[name] = 0.0, 0, pids[name] + 1
        uptime[name] += 1.0
        counted[name] += more
        total += more
        if more % 2:
            sums.forget([name])
        sums.update({name: reading(uptime[name], counted[name], pids[name])})
        seen = sample(sums.exposition(), "tokens_total")
        state = sums.state(0.0)
        assert state is not None
        assert seen == total == state["now"]["emitted"] == state["positions"]["judged"][0] >= last
        assert state["ledger"]["observed"] == state["ledger"]["predicted"] == total
        assert sample(sums.exposition(), "load") == len(sums.live) == state["now"]["running"]
        last = seen
