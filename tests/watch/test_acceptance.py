"""Acceptance of single requests in each engine's form, and what it predicts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from outrider.integrations.watch.acceptance import Acceptance, of_reply, predict

VLLM = {
    "num_spec_steps": 15,
    "num_draft_tokens": 45,
    "num_accepted_draft_tokens": 36,
    "acceptance_histogram": [1, 3, 0, 11],
    "per_step_accepted": [3, 3, 0, 3, 1, 3, 3, 3, 1, 3, 3, 3, 1, 3, 3],
    "per_step_drafted": [3] * 15,
}
"""As vLLM 0.32 sent it with `--per-request-spec-decode-metrics detailed`."""


def reply(found: dict[str, Any]) -> dict[str, Any]:
    return {"choices": [], "metrics": {"speculative_decoding": found}}


def test_steps_and_histogram_say_the_same_where_drafts_are_even() -> None:
    detailed = of_reply(reply(VLLM))
    summary = of_reply(reply({k: v for k, v in VLLM.items() if not k.startswith("per_step")}))
    assert detailed == summary == Acceptance(15, 45, 36, (15, 14, 11), (14, 11, 11))


def test_ragged_drafts_need_the_steps() -> None:
    ragged = {
        "num_spec_steps": 3,
        "num_draft_tokens": 6,
        "num_accepted_draft_tokens": 3,
        "acceptance_histogram": [1, 1, 1, 0],
    }
    assert of_reply(reply(ragged)) == Acceptance(3, 6, 3)
    steps = {"per_step_accepted": [0, 2, 1, 0], "per_step_drafted": [3, 2, 1, 0]}
    found = of_reply(reply(ragged | steps))
    assert found is not None and found.judged_at == (3, 1, 0) and found.accepted_at == (2, 1, 0)  # 3: rejected at once


def test_llamacpp_and_sglang_forms() -> None:
    assert of_reply({"timings": {"draft_n": 44, "draft_n_accepted": 6}}) == Acceptance(None, 44, 6)
    found = {"spec_verify_ct": 4, "spec_num_proposed_drafts": 8, "spec_num_correct_drafts": 4}
    found |= {"spec_correct_drafts_histogram": [1, 2, 1]}
    assert of_reply({"sglext": {"spec_tokens_details": found}}) == Acceptance(4, 8, 4, (4, 3), (3, 1))


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"timings": {}},
        {"metrics": None},
        {"timings": {"draft_n": 1, "draft_n_accepted": 2}},
        {"timings": {"draft_n": True, "draft_n_accepted": 0}},
        reply({}),
        reply(VLLM | {"num_spec_steps": -1}),
        reply(VLLM | {"num_accepted_draft_tokens": 46}),
        reply(VLLM | {"per_step_accepted": [4] * 15}),
        reply(VLLM | {"num_draft_tokens": 1e9}),
        {"sglext": {"spec_tokens_details": [1]}},
    ],
)
def test_what_cannot_be_true_is_no_acceptance(document: Any) -> None:
    assert of_reply(document) is None


def test_the_prediction_of_the_served_length_is_what_was_served() -> None:
    rng = np.random.default_rng(3)
    requests = []
    for _ in range(40):
        steps = [int(np.argmin([*(rng.random(4) < 0.7), False])) for _ in range(30)]
        kept = tuple(sum(a > d for a in steps) for d in range(4))
        requests.append(Acceptance(30, 120, sum(steps), (30, *kept[:-1]), kept))
    found = predict(requests)
    served = 1 + sum(r.accepted for r in requests) / sum(r.drafts or 0 for r in requests)
    assert found[3].value == pytest.approx(served) and not found[3].beyond and found[4].beyond
    assert [x.length for x in found] == [1, 2, 3, 4, 5, 6]
    assert found[0].value == pytest.approx(1 + sum(r.accepted_at[0] for r in requests) / 1200)
    # positions are independent with probability 0.7: 1 + 0.7 + 0.49 + ...
    for x in found:
        assert x.low is not None and x.high is not None
        true = sum(0.7**i for i in range(x.length + 1))
        assert abs(x.value - true) < 6 * (x.high - x.low)  # six standard errors and more: less than one in a billion


def test_one_request_has_no_interval_and_none_has_no_prediction() -> None:
    assert predict([]) == [] and predict([Acceptance(None, 5, 1)]) == []
    assert all(x.low is None and x.high is None for x in predict([Acceptance(3, 6, 3, (3, 2), (2, 1))]))
