"""A grammar that runs out of its budget in the middle of a text ends its own request, says so, and costs nobody else anything."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from outrider.build import build_engine
from outrider.sampling import grammar as grammar_module
from outrider.sampling.automaton import Automaton
from outrider.sampling.grammar import Grammars
from tests.serve.harness import Running, serving, until


def pattern(branches: int, gap: int) -> str:
    """Cheap to compile; its automaton has exponentially many states, which are made as a text visits them."""
    pairs = ("ab", "cd", "ef", "gh", "ij", "kl")[:branches]
    return "|".join(f".*{a}.{{{gap + i}}}{b}" for i, (a, b) in enumerate(pairs))


def body(branches: int, gap: int, **more: Any) -> dict[str, Any]:
    schema = {"type": "string", "pattern": f"^({pattern(branches, gap)}){{1,3}}$"}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    base = {"model": "pycode", "prompt": "x = ", "max_tokens": 100, "temperature": 1.5, "seed": 0, "stream": True}
    return {**base, "response_format": wanted, **more}


def events(reply: bytes) -> list[dict[str, Any]]:
    return [json.loads(part[6:]) for part in reply.split(b"\n\n") if part.startswith(b"data: {")]


@pytest.fixture(scope="module")
def small() -> Any:
    with serving(slots=2) as running:
        yield running


def incidents(running: Running) -> float:
    text = running.call("GET", "/metrics")[2].decode()
    return float(next(x for x in text.splitlines() if x.startswith("outrider_incidents_total")).split()[-1])


def test_an_exhausted_grammar_ends_its_request_and_nothing_else(small: Running) -> None:
    """Text, then one error event; the neighbour's text is the one it writes alone."""
    neighbour = {
        "model": "pycode",
        "prompt": "def f(",
        "max_tokens": 120,
        "seed": 5,
        "ignore_eos": True,
        "temperature": 1.0,
    }
    alone = json.loads(small.call("POST", "/v1/completions", neighbour)[2])["choices"][0]["text"]
    beside: list[bytes] = []
    thread = threading.Thread(target=lambda: beside.append(small.call("POST", "/v1/completions", neighbour)[2]))
    thread.start()
    before = incidents(small)
    for again in range(2):
        status, _, reply = small.call("POST", "/v1/completions", body(6, 20, max_tokens=300))
        *texts, last = events(reply)
        assert status == 200 and reply.endswith(b"data: [DONE]\n\n")
        assert last["error"]["type"] == "invalid_request_error" and "middle of the text" in last["error"]["message"]
        assert len(texts) > 3 and all(t["choices"][0]["finish_reason"] is None for t in texts)
        assert incidents(small) == before + again + 1
    thread.join()
    assert json.loads(beside[0])["choices"][0]["text"] == alone
    status, _, reply = small.call("POST", "/v1/completions", body(6, 20, stream=False, n=2, max_tokens=300))
    assert status == 400 and json.loads(reply)["error"]["type"] == "invalid_request_error"
    until(
        lambda: small.bridge.engine.scheduler.free == 2 and not small.bridge.tickets and not small.bridge.worker.routes
    )
    assert small.bridge.metrics.outcomes["error"] == 3 and small.call("GET", "/ready")[0] == 200


def test_a_budget_is_not_spent_by_the_requests_before(small: Running) -> None:
    """Copies of one compiled grammar share what they have built of its automaton: texts that fit all come to their ends."""
    before = incidents(small)
    for seed in range(4):
        _, _, reply = small.call("POST", "/v1/completions", body(2, 20, seed=seed))
        assert "error" not in events(reply)[-1]
        assert events(reply)[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    assert incidents(small) == before


def test_an_automaton_says_that_it_is_exhausted_and_its_successor_is_not() -> None:
    engine = build_engine(slots=1, draft="none")
    grammars: Grammars = engine.parts.pipeline.grammars
    text = f"regex:({pattern(6, 20)}){{1,3}}"
    wild, tame = grammars.start(text), grammars.start(text)
    output: list[int] = []
    while not wild.exhausted and len(output) < 400:
        mask = wild.allowed([])
        choices = mask.nonzero().flatten().tolist()
        output.append(choices[(len(output) * 7919) % len(choices)])
        wild.follow(output)
    assert 3 < len(output) < 400
    end = set(wild.allowed([]).nonzero().flatten().tolist())
    assert end == set(wild.allowed([5, 6]).nonzero().flatten().tolist()) == set(grammars.eos)
    fresh = Automaton(Grammars(*_parts(engine)), text)
    assert (tame.allowed([]) == fresh.allowed([])).all() and not tame.exhausted
    wild.follow([])  # another sequence takes its place
    assert (wild.allowed([]) == fresh.allowed([])).all() and not wild.exhausted


def test_a_grammar_that_is_dear_is_not_compiled_in_the_middle_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody would wait for it, once for every sample: the text ends with an error instead, and the next one begins anew."""
    monkeypatch.setattr(grammar_module, "DEAR", -1.0)
    engine = build_engine(slots=1, draft="none")
    grammars: Grammars = engine.parts.pipeline.grammars
    text = f"regex:({pattern(6, 20)}){{1,3}}"
    automaton = grammars.start(text)
    monkeypatch.setattr(grammars, "own", None)
    output: list[int] = []
    while not automaton.exhausted and len(output) < 400:
        choices = automaton.allowed([]).nonzero().flatten().tolist()
        output.append(choices[(len(output) * 7919) % len(choices)])
        automaton.follow(output)
    assert 3 < len(output) < 400
    assert set(automaton.allowed([]).nonzero().flatten().tolist()) == set(grammars.eos)
    assert text not in grammars.kept and not grammars.start(text).exhausted


def _parts(engine: Any) -> tuple[str, int, tuple[int, ...]]:
    from outrider.sampling.grammar import tokenizer_json

    pipeline = engine.parts.pipeline
    return str(tokenizer_json(engine.tokenizer)), pipeline.vocab_size, pipeline.eos_ids
