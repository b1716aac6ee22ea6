"""The proposer on the arrays that vLLM hands over: rows that are swapped, used again, or still read their prompts."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from outrider.drafters.ngram import NGram
from outrider.errors import ConfigError
from outrider.integrations.vllm.drafting import Drafting, Knowledge, grammar_of
from outrider.integrations.vllm.lengths import own_limit
from outrider.integrations.vllm.proposer import HistoryProposer, Slots
from outrider.types import Draft, Evidence
from tests.integrations.vllm_stubs import Batch, config

VOCAB = 50


class Echo:
    """Drafts a function of the whole text, and checks that each slot's text only ever grows until it is released."""

    name, layers, trees = "echo", (), False
    max_depth = max_nodes = 4

    def __init__(self) -> None:
        self.seen: dict[int, list[int]] = {}

    def bind(self, slots: int, length: int) -> None:
        self.slots = slots

    def release(self, slots: Any) -> None:
        for slot in slots:
            self.seen.pop(slot, None)

    def draft(self, evidence: Evidence, budget: Any) -> Draft:
        trees = []
        for view, most in zip(evidence.sequences, budget, strict=True):
            before = self.seen.get(view.slot, [])
            assert view.tokens[: len(before)] == before, "a slot holds one text"
            assert view.cached == len(view.tokens) - 1
            self.seen[view.slot] = list(view.tokens)
            trees.append((expected(view.tokens, most), list(range(-1, most - 1))))
        return Draft.join(trees)


def expected(tokens: list[int], most: int) -> list[int]:
    return [(sum(tokens) * 31 + len(tokens) + d) % VOCAB for d in range(most)]


def proposer(drafter: Any = None, **settings: Any) -> HistoryProposer:
    made = HistoryProposer(config(**{"lengths": "fixed", **settings}))
    made.use(drafter or Echo(), VOCAB)
    return made


def test_each_row_is_drafted_for_from_its_own_text_however_rows_move() -> None:
    """400 random steps: rows grow by 1 to 5 tokens, swap places, end and begin again, and read prompts in chunks."""
    draw = random.Random(0)
    made, batch = proposer(), Batch()
    texts: list[list[int] | None] = [None] * 4
    for _ in range(400):
        if draw.random() < 0.3:
            a, b = draw.randrange(4), draw.randrange(4)
            texts[a], texts[b] = texts[b], texts[a]
        sampled: list[list[int]] = []
        for row in range(4):
            mine = texts[row]
            if mine is None or len(mine) > 55 or draw.random() < 0.05:
                texts[row] = [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 8))]
                sampled.append([] if draw.random() < 0.5 else [texts[row][-1]])
            else:
                new = [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 5))]
                mine += new
                sampled.append(new)
            batch.put(row, texts[row] or [])
        out = made.propose(*batch.arguments(sampled))
        for row, (text, got) in enumerate(zip(texts, out, strict=True)):
            assert got == ([] if not sampled[row] else expected(text or [], min(4, 64 - len(text or []) - 1)))
    assert made.report()["faults"] == 0


def test_ragged_drafts_and_an_empty_one_for_a_prompt_chunk() -> None:
    made, batch = proposer(NGram(4)), Batch()
    batch.put(0, [1, 2, 3, 9, 1, 2, 3])
    batch.put(1, [7, 8, 9])
    batch.put(2, [4, 5, 4, 5])
    assert made.propose(*batch.arguments([[3], [9], [], []])) == [[9, 1, 2, 3], [], [], []]
    batch.put(2, [4, 5, 6, 4, 5])
    assert made.propose(*batch.arguments([[], [], [5], []]))[2] == [6, 4, 5]


def test_no_draft_reaches_beyond_the_context() -> None:
    made, batch = proposer(), Batch()
    for size, most in ((58, 4), (60, 3), (62, 1), (63, 0), (64, 0)):
        batch.put(0, list(range(size)))
        assert len(made.propose(*batch.arguments([[1], [], [], []]))[0]) == most


def test_lengths_follow_the_settings_zero_included() -> None:
    made, batch = proposer(lengths=[0, 3, 1]), Batch()
    text, sizes = [1, 2], []
    for n in range(6):
        text.append(n)
        batch.put(0, text)
        sizes.append(len(made.propose(*batch.arguments([[n], [], [], []]))[0]))
    assert sizes == [0, 3, 1, 0, 3, 1]


def test_a_drafter_that_fails_costs_drafts_only() -> None:
    class Broken(Echo):
        def draft(self, evidence: Evidence, budget: Any) -> Draft:
            raise RuntimeError("no")

    made, batch = proposer(Broken()), Batch()
    for n in range(5):
        batch.put(0, [1, 2, *range(n + 1)])
        assert made.propose(*batch.arguments([[n], [], [], []])) == [[], [], [], []]
    assert made.report()["faults"] == 3 and "switched off" in made.report()["notices"][0]


def test_two_rows_with_one_text_stay_two_sequences() -> None:
    slots = Slots(5)
    one = np.array([1, 2, 3], dtype=np.int32)
    given, fresh = slots.assign({0: one, 1: one})
    assert len(set(given.values())) == 2 and sorted(fresh) == sorted(given.values())


def test_a_request_tells_its_prediction_grammar_and_limit() -> None:
    from types import SimpleNamespace as N

    params = N(
        extra_args={"outrider_prediction": [5, 6.0, 7], "outrider_length": 2}, structured_outputs=N(json={}, regex=None)
    )
    runner = N(input_batch=N(req_ids=["a"]), requests={"a": N(prompt_token_ids=[1, 2], sampling_params=params)})
    found = Knowledge(runner).of(0)
    assert (found.name, found.prompt, found.params.prediction, found.params.draft_length) == ("a", 2, (5, 6, 7), 2)
    assert found.params.grammar == "json:{}" and grammar_of(N(json=None, regex="a+")) == "regex:a+"
    params.extra_args = {"outrider_prediction": [1, "x"]}
    assert Knowledge(runner).of(0).params.prediction == (), "a bad one counts as none"


@pytest.mark.parametrize("value", [5, 1e999, True, {"a": 1}, [1e999], "\ud800"])
def test_what_a_client_sends_never_ends_the_engine(value: Any) -> None:
    """vLLM hands over whatever JSON a request had in `vllm_xargs`; an exception here would end its engine's process."""
    from types import SimpleNamespace as N

    class Picky:
        def encode(self, text: str) -> list[int]:
            return list(text.encode())

    params = N(extra_args={"outrider_prediction": value, "outrider_length": value}, structured_outputs=None)
    runner = N(input_batch=N(req_ids=["a"]), requests={"a": N(prompt_token_ids=[1, 2], sampling_params=params)})
    found = Knowledge(runner, Picky()).of(0)
    assert found.params.prediction == () and own_limit(params.extra_args) == (5 if value == 5 else None)


def test_the_prediction_of_a_request_is_drafted() -> None:
    from types import SimpleNamespace as N

    from outrider.drafters.prediction import PredictedOutput

    params = N(extra_args={"outrider_prediction": [3, 4, 5, 6, 7]}, structured_outputs=None)
    runner = N(input_batch=N(req_ids=["a"]), requests={"a": N(prompt_token_ids=[1, 2], sampling_params=params)})
    made, batch = proposer(PredictedOutput(4)), Batch()
    made.knowledge = Knowledge(runner)
    batch.put(0, [1, 2, 3])
    assert made.propose(*batch.arguments([[3], [], [], []]))[0] == [4, 5, 6, 7]


def test_drafters_that_read_hidden_states_are_refused_with_what_to_do() -> None:
    from outrider.assets import shipped

    own = config()
    own.model_config.model = str(shipped("target"))
    for spec in ("eagle:x", "ngram+medusa", "early:2", "recycle", "recycle+ngram", "ahead:4:x"):
        with pytest.raises(ConfigError, match="hidden states"):
            Drafting.load(spec, 4, own)
    assert Drafting.load("prediction+ngram", 4, own).drafter.name == "prediction+ngram"
    assert Drafting.load("suffix", 4, own).drafter.name == "suffix"
    model = Drafting.load(f"ngram+{shipped('draft')}", 4, own)
    assert model.drafter.name == "ngram+model" and model.vocab_size == 4096
