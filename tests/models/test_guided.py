"""Guidance: the mixed distribution is that of two plain runs, in any batch, with every way to draft, and caches stay in step."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.jacobi import Jacobi
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.none import NoDraft
from outrider.errors import ConfigError, RequestError
from outrider.models.guided import FreeText, Guided
from outrider.models.toy import TinyLM
from outrider.nn.kv import PagedKV
from outrider.params import SamplingParams
from outrider.types import Draft, Rows
from outrider.verify import load_rule

V, CLASSES, NULL, MARK = 19, (15, 16), 17, 18
MODEL = TinyLM(V, 16, 2, seed=4, sharp=3.0)
FREE = FreeText(dict.fromkeys(CLASSES, NULL))
BEGUN = {
    "the mark": FreeText(mark=MARK, prompt=(MARK,)),
    "a long prompt": FreeText(mark=MARK, prompt=(3, 14, 15, 9, 2, 6, 5, MARK)),
    "a prompt without the mark, and stand-ins": FreeText({15: NULL, 3: 4}, MARK, (3, 1)),
}
"""Free texts of other lengths than the conditioned ones."""


def free_of(text: list[int], free: FreeText) -> list[int]:
    """The definition of the free text."""
    start = text.index(MARK) + 1 if free.mark is not None else 0
    return [*free.prompt, *(free.stand_ins.get(t, t) for t in text[start:])]


def logits_after(text: list[int]) -> torch.Tensor:
    return MODEL.forward(Rows.assemble([0], [text], [0], Draft.empty(1)), MODEL.new_kv(1, 60)).logits[0]


def mixed(text: list[int], scale: float, free: FreeText = FREE) -> torch.Tensor:
    """The definition, from two plain forwards of the whole text."""
    given, other = logits_after(text), logits_after(free_of(text, free))
    return other + scale * (given - other)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 4.0])
def test_rows_of_a_tree_are_mixed_as_defined(scale: float) -> None:
    """Two texts, a chunk that is not scored, and trees with siblings: every scored row, and hidden states of the conditioned."""
    guided = Guided(MODEL, FREE, scale)
    kv = guided.new_kv(3, 40)
    texts = [[15, 3, 4], [16, 2], [15, 7, 8, 9]]
    draft = Draft.join([([5, 6, 1], [-1, -1, 0]), ([4], [-1])])
    rows = Rows.assemble([0, 2, 1], texts, [0, 0, 0], draft, [True, True, False])
    kv.reserve(rows)
    scores = guided.forward(rows, kv, layers=(2,))
    paths = [texts[0], texts[1], [*texts[0], 5], [*texts[0], 6], [*texts[0], 5, 1], [*texts[1], 4]]
    for row, path in zip(scores.logits, paths, strict=True):
        assert torch.allclose(row, mixed(path, scale), atol=1e-10)
    assert scores.hidden[0].shape == (rows.count, 16)
    kv.commit(rows, [[1], [0], []])
    assert kv.length == [4, 4, 3]
    assert kv.inner.length == [4, 4, 3] * 2
    again = Rows.assemble([0, 2, 1], [[8], [9], [1]], [kv.length[0], kv.length[2], kv.length[1]], Draft.empty(3))
    found = guided.forward(again, kv).logits
    for row, path in zip(found, ([*texts[0], 6, 8], [*texts[1], 4, 9], [*texts[2], 1]), strict=True):
        assert torch.allclose(row, mixed(path, scale), atol=1e-10)
    kv.truncate(0, 1)
    kv.release([1, 2])
    assert kv.inner.length == [1, 0, 0] * 2


class SmallPages(TinyLM):
    """Pages of 4 tokens."""

    def new_kv(self, slots: int, length: int) -> PagedKV:
        sizes = self.layers, slots, self.heads, length, self.hidden_size // self.heads
        return PagedKV(*sizes, self.dtype, self.device, page=4)


def grown(rng: random.Random) -> tuple[list[int], list[int]]:
    """A tree of a few draft tokens: tokens, and the parent of each."""
    size = rng.randrange(4)
    return [rng.randrange(15) for _ in range(size)], [rng.randrange(-1, i) for i in range(size)]


def path_of(parents: list[int], rng: random.Random) -> list[int]:
    """Nodes of a path from the anchor down, of any length."""
    path: list[int] = []
    while (below := [i for i, up in enumerate(parents) if up == (path[-1] if path else -1)]) and rng.random() < 0.7:
        path.append(rng.choice(below))
    return path


@pytest.mark.parametrize("kind", BEGUN)
def test_any_history_of_a_cache_gives_the_definition(kind: str) -> None:
    """Three slots, prompts in chunks, trees, cuts before and behind the mark, released slots: logits of every scored row, lengths
    of both texts, and never more pages than was said."""
    free, rng = BEGUN[kind], random.Random(len(kind))
    guided = Guided(SmallPages(V, 16, 2, seed=4, sharp=3.0), free, 2.0)
    kv: Any = guided.new_kv(3, 40)
    held: list[list[int]] = [[], [], []]
    scored = 0
    for step in range(250):
        slots = rng.sample(range(3), rng.randrange(1, 4))
        for slot in slots:
            what, text = rng.random(), held[slot]
            if what < 0.1 or len(text) > 30:
                kv.release([slot])
                held[slot] = []
            elif what < 0.3 and text:
                del text[rng.randrange(len(text)) :]
                kv.truncate(slot, len(text))
        pieces = [[rng.randrange(15) for _ in range(rng.randrange(1, 5))] for _ in slots]
        for piece in pieces:
            for _ in range(rng.choice((0, 0, 0, 1, 2))):  # a second one is any token
                piece[rng.randrange(len(piece))] = MARK
        wanted = [MARK in held[s] + piece and rng.random() < 0.8 for s, piece in zip(slots, pieces, strict=True)]
        trees = [grown(rng) for want in wanted if want]
        rows = Rows.assemble(slots, pieces, [len(held[s]) for s in slots], Draft.join(trees), wanted)
        ends = [s.cached + s.count for s in rows.segments]
        most, had = sum(map(kv.lacking, slots, ends)), kv.spare
        assert all(
            kv.lacking(s, e) <= kv.needed((*held[s], *p), e - len(held[s]) - len(p))
            for s, e, p in zip(slots, ends, pieces, strict=True)
        )
        kv.reserve(rows)
        assert had - kv.spare <= most
        scores = guided.forward(rows, kv, layers=(2,))
        assert len(scores.hidden[0]) == rows.count
        texts = [[*held[s], *piece] for s, piece, want in zip(slots, pieces, wanted, strict=True) if want]
        draft = Draft.join(trees)
        paths = [
            *texts,
            *(
                [*texts[draft.sequence_of_row[len(trees) + k]], *p]
                for k, p in enumerate(draft.path_tokens[len(trees) :])
            ),
        ]
        for row, text in zip(scores.logits, paths, strict=True):
            assert torch.allclose(row, mixed(text, 2.0, free), atol=1e-9), step
            scored += 1
        chosen = iter([path_of(parents, rng) for _, parents in trees])
        kept = [next(chosen) if want else [] for want in wanted]
        kv.commit(rows, kept)
        trees_of = iter(trees)
        for slot, piece, want, path in zip(slots, pieces, wanted, kept, strict=True):
            held[slot] += [*piece, *((lambda own: [own[i] for i in path])(next(trees_of)[0]) if want else [])]
        assert kv.length == [len(text) for text in held]
        assert kv.inner.length[3:] == [len(free_of(t, free)) if MARK in t else 0 for t in held]
    assert scored > 200


@pytest.mark.parametrize("free", [FREE, *BEGUN.values()], ids=["stand-ins", *BEGUN])
@pytest.mark.parametrize("kind", ["model", "jacobi", "tree"])
def test_drafted_texts_are_those_of_plain_guided_decoding(kind: str, free: FreeText) -> None:
    """In company, with prompts of different lengths in chunks of three rows, and sent back in the middle."""
    guided = Guided(MODEL, free, 2.0)
    params = [SamplingParams(max_tokens=14, seed=i, logit_bias=dict.fromkeys(range(15, V), -100.0)) for i in range(5)]
    prompts = [[15, MARK], [16, 2, 3, 4, 5, 6, MARK], [MARK], [16, 1, 2, MARK], [15, 7, 7, MARK]]

    def texts(drafter, slots: int, chunk: int) -> list[tuple[int, ...]]:
        one = Engine(guided, drafter, load_rule("match"), Fixed(4), slots=slots, max_length=40, chunk=chunk)
        names = [one.submit(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        found: dict[str, list[int]] = {name: [] for name in names}
        step = 0
        while one.busy:
            for event in one.step():
                assert not event.error
                found[event.request] += event.tokens
            step += 1
            if chunk == 3 and step in (2, 4, 5):
                one.preempt(names[0])
        assert one.defects == 0
        return [tuple(found[name]) for name in names]

    draft = Guided(MODEL.perturbed(0.3, seed=1), free, 2.0)
    drafter = {
        "model": lambda: ModelDrafter(draft, 4, sample="coupled"),
        "jacobi": lambda: Jacobi(4, V, columns=3),
        "tree": lambda: ModelDrafter(draft, 3, branching=(2, 1, 2)),
    }[kind]()
    plain = texts(NoDraft(), 1, 256)
    assert texts(drafter, 3, 3) == plain
    assert all(max(t) < 15 for t in plain)


def test_a_text_without_the_mark_is_refused_and_the_next_one_is_not() -> None:
    one = Engine(Guided(MODEL, BEGUN["the mark"], 2.0), NoDraft(), load_rule("match"), Fixed(0), slots=1, max_length=40)
    params, texts = SamplingParams(max_tokens=5, seed=3), []
    for _ in range(2):
        with pytest.raises(RequestError, match="end the prompt with token 18"):
            one.generate([[1, 2, 3]], params)
        texts += [r.outputs[0].token_ids for r in one.generate([[1, 2, MARK]], params)]
    assert texts[0] == texts[1]


def test_bad_scales_and_tokens_are_refused() -> None:
    short = TinyLM(V, 16, 2, seed=4, max_length=8)
    for model, free, scale, words in (
        (MODEL, FREE, -1.0, "from 0 to 100"),
        (MODEL, FREE, float("nan"), "from 0"),
        (MODEL, FreeText({15: V}), 1.0, "token 19, outside"),
        (MODEL, FreeText({-1: 3}), 1.0, "token -1, outside"),
        (MODEL, FreeText(mark=V, prompt=(1,)), 1.0, "outside"),
        (MODEL, FreeText(mark=1, prompt=(V,)), 1.0, "outside"),
        (short, FreeText(mark=1, prompt=(1,) * 9), 1.0, "does not fit the 8 positions .*: shorten the negative prompt"),
    ):
        with pytest.raises(ConfigError, match=words):
            Guided(model, free, scale)
    for half in ({"mark": 3}, {"prompt": (3,)}):
        with pytest.raises(ConfigError, match="needs a"):
            FreeText(**half)


def test_a_free_text_that_is_longer_has_room() -> None:
    """The conditioned text may fill what it was given, whatever its free one begins with."""
    free = BEGUN["a long prompt"]
    guided = Guided(TinyLM(V, 16, 2, seed=4, max_length=20), free, 2.0)
    assert guided.max_length == 20 - 7
    one = Engine(guided, NoDraft(), load_rule("match"), Fixed(0), slots=1)
    (result,) = one.generate([[MARK]], SamplingParams(max_tokens=12, ignore_eos=True))
    assert len(result.outputs[0].token_ids) == 12
