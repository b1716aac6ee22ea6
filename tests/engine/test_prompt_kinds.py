"""A string is one prompt, a flat sequence of ids is one prompt, and what is neither is refused in a sentence: at every entrance."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import outrider
from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.engine.prompts import as_ids, as_params, as_prompt, as_prompts
from outrider.errors import ConfigError, RequestError
from outrider.evaluate.measure import Arm, run_arms
from outrider.evaluate.planning.plan import configurations
from outrider.evaluate.scoring.score import Item, as_items
from outrider.params import SamplingParams
from outrider.train.corpus import read_corpus
from outrider.verify import load_rule
from tests.contract.asked import target
from tests.contract.drafters import DRAFTERS

IDS = [3, 1, 4, 1, 5]
GREEDY = SamplingParams(temperature=0.0, max_tokens=3)


class Letters:
    """A tokenizer of one id a character."""

    eos_token_id = None

    def encode(self, text: str) -> list[int]:
        return [ord(c) % 7 for c in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + i) for i in ids)


@pytest.fixture(scope="module")
def one():
    model = target()
    parts = (model, DRAFTERS["model"](model, 4), load_rule("speculative_sampling"), Fixed(4))
    return Engine(*parts, slots=4, max_length=64, tokenizer=Letters())


@pytest.mark.parametrize(
    "given", [{"temperature": 0}, {"temperature": 0, "n": 1}, "greedy", 5, [{"temperature": 0}], [None, 3]]
)
def test_sampling_parameters_of_another_kind_are_refused_by_their_name(one: Engine, given) -> None:
    calls = [lambda: one.generate("ab", given)] + [lambda: one.submit("ab", given)] * (not isinstance(given, list))
    for call in calls:
        with pytest.raises(Exception, match=r"sampling parameters|Type-check error") as error:
            call()
        assert isinstance(error.value, RequestError) or "Type-check" in str(error.value), (
            "types that are checked refuse it first"
        )
    assert not one.busy
    with pytest.raises(RequestError, match=r"not dict: write SamplingParams\(\*\*params\)"):
        as_params({"temperature": 0})


def test_an_engine_is_neither_copied_nor_sent_away(one: Engine) -> None:
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="build one there"):
            way(one)


def test_messages_are_told_what_makes_a_prompt_of_them(one: Engine) -> None:
    for given in ([{"role": "user", "content": "hi"}], {"role": "user", "content": "hi"}):
        with pytest.raises(RequestError, match="apply_chat_template"):
            one.generate(given, GREEDY)  # type: ignore[arg-type]


def test_half_a_character_is_no_prompt(one: Engine) -> None:
    with pytest.raises(RequestError, match="half a surrogate pair, which is no character, at place 1"):
        one.generate("a\ud800b", GREEDY)


ONE = {
    "text": "def f",
    "list": IDS,
    "tuple": tuple(IDS),
    "range": range(5),
    "generator of ids": (i for i in IDS),
    "array": np.array(IDS),
    "numpy ids": [np.int64(i) for i in IDS],
    "tensor": torch.tensor(IDS),
    "tensors": [torch.tensor(i) for i in IDS],
}
SEVERAL = {
    "texts": ["ab", "cd"],
    "texts in a tuple": ("ab", "cd"),
    "generator": (t for t in ["ab", "cd"]),
    "lists": [IDS, IDS[:2]],
    "tensors": [torch.tensor(IDS), torch.tensor(IDS[:2])],
    "both": ["ab", IDS],
    "matrix": torch.tensor([IDS, IDS]),
    "array": np.array([IDS, IDS]),
}
NEITHER = {
    "bytes": (b"def f", "decode it"),
    "bytes in a list": ([b"a", b"b"], "decode it"),
    "mapping": ({"input_ids": IDS}, "input_ids"),
    "set": ({"a", "b"}, "got set"),
    "number": (7, "got int"),
    "none": (None, "got NoneType"),
    "floats": ([1.5, 2.0], "whole number"),
    "booleans": ([True, False], "whole number"),
    "mask": (torch.tensor([True, False]), "whole number"),
    "ids and text": ([1, "a"], "list of several"),
    "three levels": ([[IDS]], "list of several"),
}


@pytest.mark.parametrize("prompt", ONE.values(), ids=ONE)
def test_one_prompt_is_one(prompt) -> None:
    assert len(as_prompts(prompt if not hasattr(prompt, "gi_frame") else list(IDS))) == 1
    assert as_prompt(prompt) in ("def f", IDS, [0, 1, 2, 3, 4])


@pytest.mark.parametrize("prompts", SEVERAL.values(), ids=SEVERAL)
def test_several_prompts_are_two(prompts) -> None:
    assert [type(p) in (str, list) for p in as_prompts(prompts)] == [True, True]


@pytest.mark.parametrize(("prompts", "why"), NEITHER.values(), ids=NEITHER)
def test_what_is_neither_is_refused(prompts, why: str) -> None:
    with pytest.raises(RequestError, match=why):
        as_prompts(prompts)


def test_one_is_wanted_and_several_are_given(one) -> None:
    for wrong in (["ab", "cd"], [IDS, IDS], torch.tensor([IDS])):
        with pytest.raises(RequestError, match="list of several"):
            one.submit(wrong, GREEDY)
    assert not one.busy


def test_generate_and_stream_take_all_of_them(one) -> None:
    whole = one.generate(["def f"], GREEDY)
    assert [r.text for r in one.generate("def f", GREEDY)] == [r.text for r in whole]
    assert "".join(e.text for e in one.stream("def f", GREEDY)) == whole[0].text
    by_id = [one.generate(p, GREEDY)[0].outputs for p in (IDS, tuple(IDS), np.array(IDS), torch.tensor(IDS), [IDS])]
    assert len({o[0].token_ids for o in by_id}) == 1
    assert len(one.generate((t for t in ("ab", "cd")), [GREEDY, GREEDY])) == 2
    assert one.generate([], GREEDY) == []


def test_an_empty_prompt_is_refused_and_leaves_nothing_behind(one) -> None:
    for wrong in ("", [""], ["ab", ""], [[]], ["ab", []]):
        with pytest.raises(RequestError, match="empty"):
            one.generate(wrong, GREEDY)
        assert not one.busy


def test_what_measures_sees_one_prompt_too(one) -> None:
    arms = [Arm("one", one)]
    records = run_arms(arms, "def f", GREEDY, repeats=1, warmup=0)
    assert [r.tokens for r in records] == [3] == [r.tokens for r in run_arms(arms, IDS, GREEDY, repeats=1, warmup=0)]
    with pytest.raises(ConfigError, match="without a prompt"):
        run_arms(arms, [], GREEDY)
    with pytest.raises(ConfigError, match="without an arm"):
        run_arms([], "x", GREEDY)
    assert as_items("def f") == [Item("def f")] == as_items([Item("def f")])
    assert configurations("ngram", [0, 2], [1]) == configurations(["ngram"], [0, 2], [1])


def test_what_audits_asks_for_ids() -> None:
    assert as_ids(IDS) == [IDS]
    with pytest.raises(RequestError, match="expected token ids"):
        as_ids(["def f"])


def test_the_one_call_function_takes_a_string_and_ids() -> None:
    assert len(outrider.generate("x = ", SamplingParams(max_tokens=2), draft="none")) == 1
    assert len(outrider.generate(IDS, SamplingParams(max_tokens=2), draft="none")) == 1


def test_a_corpus_is_named_by_one_path_or_several(tmp_path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one text\n")
    assert read_corpus(str(file)) == read_corpus(file) == read_corpus([file])


def test_fields_of_a_request_that_are_lists() -> None:
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)
    for field in ("stop_token_ids", "prediction", "logit_bias"):
        with pytest.raises(RequestError, match="must be a list"):
            SamplingParams(**{field: "12"})
