"""Engine options: each checked when it is made, in words that name it, and what a change of them keeps."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch

from outrider.errors import ConfigError
from outrider.options import EngineOptions, types_of


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": -1}, "length must be a whole number of at least 0, got -1"),
        ({"length": True}, "length must be a whole number"),
        ({"length": "3"}, "length must be a whole number of at least 0, got '3'"),
        ({"slots": 0}, "slots must be a whole number of at least 1"),
        ({"chunk": 0.5}, "chunk must be a whole number of at least 1"),
        ({"max_length": 0}, "max_length must be a whole number of at least 1"),
        ({"draft": None}, "draft must be a text, got None"),
        ({"rule": 3}, "rule must be a text, got 3"),
        ({"lengths": 3}, "lengths must be a text, got 3"),
        ({"lengths": "per-sequence"}, "unknown way to set draft lengths 'per-sequence'; did you mean 'per_sequence'"),
        ({"lengths": "fixed:4"}, "takes no number"),
        ({"lengths": "bass:2"}, "the longest draft, 3 .the draft length. to 64"),
        ({"lengths": "adaptive:65"}, "the longest draft"),
        ({"lengths": "bass:"}, "the longest draft"),
    ],
)
def test_a_bad_value_is_refused_when_it_is_made(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineOptions(**options)
    with pytest.raises(ConfigError, match=words):
        EngineOptions().changed(**options)


def test_numbers_and_names_of_other_libraries_are_plain_values() -> None:
    there = torch.device("cuda", 1)
    made = EngineOptions(
        length=np.int64(2), slots=torch.tensor(4), dtype=torch.float32, device=there, kv_memory=np.float32(2)
    )
    assert made == EngineOptions(length=2, slots=4, dtype="float32", device="cuda:1", kv_memory=2.0)
    assert {type(getattr(made, f.name)) for f in fields(made)} <= {int, str, float, bool, type(None)}
    several = torch.tensor([1, 2])
    for bad in (
        {"length": several},
        {"slots": np.float64(2)},
        {"device": "mps"},
        {"device": ""},
        {"kv_memory": np.nan},
    ):
        with pytest.raises(ConfigError):
            EngineOptions(**bad)


def test_a_change_keeps_the_rest_and_the_original() -> None:
    one = EngineOptions(target="a", length=5)
    two = one.changed(draft="ngram", max_length=64)
    assert (two.target, two.length, two.draft, two.max_length) == ("a", 5, "ngram", 64)
    assert one == EngineOptions(target="a", length=5) and hash(one) != hash(two)
    with pytest.raises(FrozenInstanceError):
        one.length = 2  # type: ignore[misc]


def test_the_longest_draft_is_what_stands_behind_the_name() -> None:
    longest = lambda **options: EngineOptions(**options).longest  # noqa: E731
    assert (longest(), longest(lengths="adaptive"), longest(lengths="adaptive:8")) == (3, 3, 8)
    assert (longest(lengths="per_sequence"), longest(lengths="bass"), longest(lengths="bass:9")) == (12, 32, 9)
    assert longest(lengths="per_sequence", length=20) == 20 and longest(lengths="bass", length=0) == 0
    assert EngineOptions(lengths="bass:9").follows == "bass"


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown engine option 'lenght'; did you mean 'length'"):
        EngineOptions().changed(lenght=3)


def test_every_option_has_a_type_and_a_default_of_it() -> None:
    for f in fields(EngineOptions):
        value = getattr(EngineOptions(), f.name)
        assert value is None or type(value) in types_of(f.name)
    assert types_of("draft_quantize") == (str,) and types_of("allow_lossy") == (bool,)
