"""SamplingParams: every range is checked, every message names field and value, unknown keys name the nearest."""

import dataclasses
import math

import numpy as np
import pytest

from outrider.errors import ConfigError, RequestError
from outrider.sampling import SamplingParams

NAN, INF = math.nan, math.inf

BAD = [
    ("temperature", [-0.1, 1e-7, 101, NAN, INF, "1", None, True, [1], 10**400]),
    ("top_k", [-1, 1.5, "5", None, True, 2**40]),
    ("top_p", [0, -0.5, 1.01, NAN, None]),
    ("min_p", [-0.01, 1.01, NAN, INF]),
    ("repetition_penalty", [0, -1, 101, NAN]),
    ("presence_penalty", [-2.1, 2.1, NAN]),
    ("frequency_penalty", [-2.1, 2.1, INF]),
    ("logit_bias", [{-1: 1.0}, {1: NAN}, {1: 101}, {1.5: 1}, {"x": 1}, {"²": 1}, [(1, 1.0), (1, 2.0)], [3], 7, "ab"]),
    ("logit_bias", [dict.fromkeys(range(1025), 0.0)]),
    ("seed", [1.5, "7", 2**63, -(2**63) - 1, True]),
    ("n", [0, 65, 1.0, None]),
    ("max_tokens", [0, -1, 1.5, None]),
    ("min_tokens", [-1, 129, None]),
    ("ignore_eos", [1, "yes", None]),
    ("stop", [[""], ["x" * 257], ["a"] * 17, [3], 3, b"a"]),
    ("stop_token_ids", [[-1], [1.5], [True], 5, "ab", list(range(257))]),
    ("logprobs", [-1, 21, 1.5, True]),
    ("prediction", [[-1], ["a"], 3, [0] * 65_537]),
]


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in BAD for v in values])
def test_bad_values_are_refused_with_the_field_and_the_range(name, value):
    with pytest.raises(RequestError, match=name) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert "got" in message and "\n" not in message and len(message) < 250


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 1e-6),
        ("temperature", 100),
        ("top_k", np.int64(3)),
        ("top_p", 1e-9),
        ("min_p", 1),
        ("repetition_penalty", 0.01),
        ("presence_penalty", -2),
        ("seed", -(2**63)),
        ("seed", None),
        ("n", 64),
        ("min_tokens", 128),
        ("stop", ["x" * 256] * 16),
        ("logprobs", 0),
        ("logprobs", 20),
        ("logit_bias", dict.fromkeys(range(1024), 100.0)),
        ("prediction", range(5)),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(name, value):
    SamplingParams(**{name: value})


def test_values_are_normalised_so_that_equal_requests_are_equal():
    a = SamplingParams(temperature=1, logit_bias={7: 1, 3: -2}, stop=["a"], stop_token_ids=[4], prediction=[1, 2])
    b = SamplingParams(
        temperature=1.0, logit_bias=((3, -2.0), (7, 1.0)), stop=("a",), stop_token_ids=(4,), prediction=(1, 2)
    )
    assert a == b and hash(a) == hash(b)
    assert a.bias == ((3, -2.0), (7, 1.0))
    assert isinstance(a.temperature, float) and math.copysign(1, SamplingParams(temperature=-0.0).temperature) == 1
    assert dataclasses.replace(a, seed=5) == dataclasses.replace(b, seed=5) != a


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]


def test_from_dict():
    given = {"temperature": 0.5, "logit_bias": {"5": 1.5}, "stop": "END", "stop_token_ids": [3], "seed": None}
    assert SamplingParams.from_dict(given) == SamplingParams(
        temperature=0.5, logit_bias={5: 1.5}, stop=("END",), stop_token_ids=(3,)
    )
    assert SamplingParams.from_dict({"stop": None, "logit_bias": None}) == SamplingParams()
    with pytest.raises(ConfigError, match="'temprature'; did you mean 'temperature'"):
        SamplingParams.from_dict({"temprature": 0.5})
    with pytest.raises(RequestError, match="token 5 twice"):
        SamplingParams.from_dict({"logit_bias": {"5": 1.5, "05": 2}})


def test_what_the_distribution_needs():
    plain = SamplingParams()
    assert not (plain.greedy or plain.penalised or plain.needs_history or plain.edits or plain.filters)
    assert SamplingParams(temperature=0).greedy
    for name, value in (("repetition_penalty", 1.1), ("presence_penalty", 0.1), ("frequency_penalty", -0.1)):
        p = SamplingParams(**{name: value})
        assert p.penalised and p.needs_history and p.edits and not p.filters
    minimum = SamplingParams(min_tokens=1)
    assert minimum.needs_history and minimum.edits and not minimum.penalised
    assert SamplingParams(logit_bias={1: 0.0}).edits and not SamplingParams(logit_bias={1: 0.0}).needs_history
    for name, value in (("top_k", 1), ("top_p", 0.9), ("min_p", 0.1)):
        assert SamplingParams(**{name: value}).filters


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids", "prediction"])
def test_tokens_outside_the_vocabulary_are_refused(name):
    params = SamplingParams(**{name: {9: 1.0} if name == "logit_bias" else (9,)})
    params.check_vocab(10)
    with pytest.raises(RequestError, match=f"{name} names token 9, but the model has tokens 0 to 8"):
        params.check_vocab(9)
