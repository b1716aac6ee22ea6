"""Drafting with a model of another vocabulary: the distribution stays, what is shared is found by spelling, the ceiling holds."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from outrider.assets import shipped
from outrider.build import build_engine
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.none import NoDraft
from outrider.errors import CapabilityError
from outrider.models.toy import TinyLM
from outrider.models.translate import shared_token_share, spelling, translate
from outrider.params import SamplingParams
from outrider.verify import load_rule
from tests.checkpoints import make_checkpoint
from tests.contract.asked import PROMPTS, VOCAB, engine, params, target, tokens

MODEL = target()


class Letters:
    """A tokenizer whose token i is written as letters[i]."""

    def __init__(self, letters: list[str]) -> None:
        self.letters = letters

    def get_vocab(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self.letters)}

    def encode(self, text: str) -> list[int]:
        return [self.letters.index(c) for c in text if c in self.letters]


OURS = Letters([chr(ord("a") + i) for i in range(VOCAB)])
THEIRS = Letters(
    [chr(ord("e") + (5 * i) % VOCAB) for i in range(VOCAB)]
)  # shifted and in another order: some are shared


def drafter(slots: int = 1, **options) -> ModelDrafter:
    other = TinyLM(VOCAB, 16, 1, seed=3, sharp=2.0)
    return ModelDrafter(translate(other, THEIRS, OURS, VOCAB), 3, vocab_size=VOCAB, **options)


@cache
def plain(sampling: str) -> list[tuple[int, ...]]:
    """Text of plain decoding."""
    return tokens(engine(MODEL, NoDraft(), load_rule("match"), 1).generate(PROMPTS, params(sampling)))


@pytest.mark.parametrize("rule", ["speculative_sampling", "match", "block", "k_seq", "optimal_transport", "traversal"])
@pytest.mark.parametrize("sampling", ["greedy", "greedy with penalties"])
def test_greedy_text_is_that_of_plain_decoding(rule: str, sampling: str) -> None:
    one = engine(MODEL, drafter(), load_rule(rule), 3)
    assert tokens(one.generate(PROMPTS, params(sampling))) == plain(sampling)
    assert one.counts.proposed > 0


def test_only_shared_tokens_are_proposed_and_their_distribution_is_whole() -> None:
    made = drafter().model
    kv = made.new_kv(1, 8)
    from outrider.types import Draft, Rows

    logits = made.forward(Rows.assemble([0], [[1, 2, 3]], [0], Draft.empty(1), [True]), kv).logits
    shared = {i for i, c in enumerate(OURS.letters) if c in THEIRS.letters}
    assert 0 < len(shared) < VOCAB
    assert set(torch.isfinite(logits[0]).nonzero().flatten().tolist()) == shared
    assert float(torch.softmax(logits, -1).sum()) == pytest.approx(1.0)


def test_a_translated_twin_is_the_model_itself() -> None:
    """The same letters in another order: every draft of the translated target is accepted."""
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(5)).tolist()
    shuffled = Letters([OURS.letters[i] for i in order])

    class Reordered:
        """The target with its vocabulary in another order."""

        def __getattr__(self, name: str):
            return getattr(MODEL, name)

        def forward(self, rows, kv, *, layers=()):
            from dataclasses import replace

            scores = MODEL.forward(replace(rows, token=torch.tensor(order)[rows.token]), kv, layers=layers)
            return scores._replace(logits=scores.logits[:, order])

    twin = ModelDrafter(translate(Reordered(), shuffled, OURS, VOCAB), 4, vocab_size=VOCAB)
    one = engine(MODEL, twin, load_rule("speculative_sampling"), 2, eos=())
    one.generate(PROMPTS, [SamplingParams(max_tokens=20, seed=i) for i in range(len(PROMPTS))])
    assert one.counts.accepted > 20
    assert one.counts.rejected == 0


def test_spellings_of_byte_level_and_sentencepiece_meet() -> None:
    bytewise = spelling({"\u0120the": 0, "\u010a": 1, "a": 2, "\u00c3\u00a9": 3})
    pieces = spelling({"\u2581the": 5, "<0x0A>": 6, "a": 7, "\u00e9": 8})
    assert {text: bytewise[text] for text in pieces} == {b" the": 0, b"\n": 1, b"a": 2, "\u00e9".encode(): 3}


def test_nothing_shared_is_refused() -> None:
    with pytest.raises(CapabilityError, match="shares no token"):
        translate(TinyLM(3, 16, 1, seed=1), Letters(["1", "2", "3"]), OURS, VOCAB)


def test_the_ceiling_is_a_share_of_the_text() -> None:
    made = translate(TinyLM(2, 16, 1, seed=1), Letters(["a", "b"]), OURS, VOCAB)
    assert shared_token_share(made, [0, 1, 2, 3]) == 0.5


def test_by_name_on_the_shipped_pair(tmp_path: Path) -> None:
    """`translate:PATH` on a checkpoint with a tokenizer of its own: greedy text unmoved, and the notice says what is shared."""
    folder = make_checkpoint(tmp_path / "other", "llama", vocab_size=300)
    (folder / "tokenizer.json").write_bytes((shipped("draft") / "tokenizer.json").read_bytes())
    p = SamplingParams(temperature=0.0, max_tokens=12)
    speculative = build_engine(draft=f"translate:{folder}", length=2, max_length=128)
    plain = build_engine(draft="none", length=0, max_length=128)
    assert (
        speculative.generate(["import os"], p)[0].outputs[0].token_ids
        == plain.generate(["import os"], p)[0].outputs[0].token_ids
    )
    assert speculative.counts.proposed > 0
    assert any("tokens are also the draft's" in notice for notice in speculative.notices)


class Framed(Letters):
    """A tokenizer that writes a begin of text before every text and an end behind it."""

    def encode(self, text: str) -> list[int]:
        return [0, *super().encode(text), 1]


def test_what_the_draft_lacks_is_fed_as_the_beginning_of_its_text_never_as_a_begin_of_text() -> None:
    theirs = Framed(["<s>", "</s>", "a", "th", "t", " ", "é"])
    ours = Letters(["<s>", "the", "tea", "ab", "zoo", "é", "th"])
    made = translate(TinyLM(7, 16, 1), theirs, ours, 9)
    assert made.fed.tolist() == [0, 3, 4, 2, 5, 6, 3, 5, 5]  # the last two are padding of the target's embedding
