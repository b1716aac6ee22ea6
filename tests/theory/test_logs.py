"""Logs of texts: what is written is read back, and a bad line is named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from outrider.theory import logs
from outrider.theory import replay as r


def test_logs_round_trip() -> None:
    rng = np.random.default_rng(4)
    for text in (
        r.Text(np.log([0.5, 0.25]), np.array([-0.1, -np.inf])),
        r.Text(
            -rng.random(5), -rng.random(5), rng.random(5) < 0.5, rng.random(5), rng.random(5), True, 9, "a", "b", "c"
        ),
    ):
        back = logs.read_log([json.dumps(logs.to_json(text)), "", "  "])[0]
        np.testing.assert_allclose(back.target, text.target, rtol=1e-8)
        np.testing.assert_allclose(back.draft, text.draft, rtol=1e-8)
        assert (back.stopped, back.limit) == (text.stopped, text.limit)
        assert (back.tv is None) == (text.tv is None)
        if text.name:
            assert (back.name, back.prompt, back.domain) == ("a", "b", "c")


GOOD = '{"target_logprobs": [-1, -2], "draft_logprobs": [-1, -2]}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "log:2: not JSON"),
        ("[1]", "log:2: expected an object, got list"),
        (
            '{"target_logprobs": [0.5], "draft_logprobs": [-1]}',
            r"log:2: target_logprobs\[0\] must be at most 0, got 0.5",
        ),
        (
            '{"target_logprobs": [-1, NaN], "draft_logprobs": [-1, -1]}',
            r"log:2: target_logprobs\[1\] must be finite, got nan",
        ),
        ('{"target_logprobs": [-Infinity], "draft_logprobs": [-1]}', r"target_logprobs\[0\] must be finite"),
        ('{"target_logprobs": [null], "draft_logprobs": [-1]}', r"target_logprobs\[0\] must be a number, got None"),
        ('{"target_logprobs": ["a"], "draft_logprobs": [-1]}', "must be a number, got 'a'"),
        ('{"target_logprobs": [-1], "draft_logprobs": [-1, -2]}', "draft_logprobs has 2 entries, target_logprobs 1"),
        ('{"target_logprobs": [-1], "draft_logprobs": [-1], "tv": [1.5]}', r"tv\[0\] must be in \[0, 1\], got 1.5"),
        ('{"target_logprobs": [-1], "draft_logprobs": [-1], "tv": [0.5, 0.5]}', "tv has 2 entries"),
        ('{"target_logprobs": [-1], "draft_logprobs": [-1], "draft_argmax_hit": ["x"]}', "draft_argmax_hit"),
        ('{"target_logprobs": [], "draft_logprobs": []}', "empty"),
        ('{"target_logprobs": [-1]}', "are needed"),
        ('{"target_logprobs": [-1], "draft_logprobs": [-1], "topp": 1}', "unknown field 'topp'"),
        ('{"target_logprobs": [-1], "draft_logprobs": [-1], "limit": 0}', "limit"),
        ('{"target_logprobs": [-1], "draft_logprobs": [-1], "stopped": 1}', "stopped must be true or false"),
    ],
)
def test_bad_lines_are_named(line: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        logs.read_log([GOOD, line])


def test_empty_log() -> None:
    with pytest.raises(ValueError, match="run.jsonl: no texts found"):
        logs.read_log(["", " "], "run.jsonl")
