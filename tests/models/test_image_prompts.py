"""Prompts with images: greedy text is that of transformers' own generate, token for token, with every kind of drafter, in batches
and with shared beginnings; samples have the model's distribution; what cannot be read exactly is refused by name."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.model_table import Told
from outrider.build import Engine, companion
from outrider.drafters.eagle.drafter import EagleDrafter
from outrider.drafters.eagle.network import EagleConfig
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import levels
from outrider.errors import CapabilityError, RequestError
from outrider.models.hf.images import HFImages
from outrider.models.hf.target import HFTarget
from outrider.models.images import images_of
from outrider.models.toy import TinyLM
from outrider.params import SamplingParams
from outrider.pictured import ImagePrompt, ImageRows, Pictured
from outrider.train.methods.eagle import new_last_features
from tests.checkpoints_images import picture, small

NEW = 12
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
FAST = ("qwen2_5_vl", "gemma3", "idefics3")
SLOW = ("qwen2_vl", "qwen3_vl", "llava")
FAMILIES = (*FAST, *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW))


@cache
def engine_of(family: str) -> Engine:
    kit = small(family)
    return Engine.build(target=kit.model, tokenizer=kit.processor, draft="none", length=0, slots=4, max_length=700)


def asked(mark: str) -> list[tuple[str, list[Any]]]:
    """Texts and their images: one, several, the same twice, and a long prompt."""
    one, two, wide = picture(1), picture(2, 40, 40), picture(3, 90, 50)
    return [
        (f"hello {mark} what is it?", [one]),
        (f"{mark} and {mark} both", [two, wide]),
        (f"again {mark}\n\n{mark} end", [one, one]),
        (f"{mark} a " + "long text " * 9 + f"{mark} and " * 3, [one, two, one, wide]),
    ]


@cache
def expected(family: str) -> list[list[int]]:
    kit = small(family)
    return [kit.text(text, images, NEW) for text, images in asked(kit.mark)]


def decoded(engine: Engine, prompts: list[ImagePrompt], params: SamplingParams = GREEDY) -> list[list[int]]:
    return [list(result.outputs[0].token_ids) for result in engine.generate(prompts, params)]


def prompts_of(family: str) -> list[ImagePrompt]:
    reader = engine_of(family).images
    return [reader.read(text, images) for text, images in asked(small(family).mark)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_transformers(family: str) -> None:
    """Alone and together, at once and in chunks of 16 rows, with what others have left in the cache and without."""
    engine, prompts, right = engine_of(family), prompts_of(family), expected(family)
    assert [decoded(engine, [prompt])[0] for prompt in prompts] == right
    for sharing in (True, False):
        pieces = companion(engine, "none", length=0, chunk=16, prefix_cache=sharing)
        assert decoded(pieces, prompts) == right
        assert decoded(pieces, prompts) == right
        assert (pieces.state.room.sums.reused > 0) is sharing
    text = asked(small(family).mark)[0][0]
    other = small(family).text(text, [picture(9)], NEW)
    assert decoded(engine, [engine.images.read(text, [picture(9)])]) == [other]
    assert other != right[0]  # the image decides: or nothing here would show that it is read


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_change_nothing(family: str) -> None:
    engine, prompts, right = engine_of(family), prompts_of(family), expected(family)
    for i, prompt in enumerate(prompts):
        told = companion(engine, Told(right[i], 3), length=3, chunk=16)
        assert decoded(told, [prompt]) == [right[i]]
        assert told.counts.accepted and told.counts.rejected


def grown(target: Any) -> Levels:
    return Levels(levels((2, 1, 1)), target.vocab_size)


def eagle(target: Any) -> EagleDrafter:
    """An EAGLE drafter with new weights, which reads the target's last hidden states."""
    wide = target.hidden_size
    config = EagleConfig(wide, wide, (target.layers,), target.vocab_size, 2, 2, wide // 2, 2 * wide)
    return EagleDrafter(new_last_features(config, target), grown(target))


def model(target: Any) -> ModelDrafter:
    """A draft model of the text's vocabulary."""
    return ModelDrafter(TinyLM(target.vocab_size, 16, 1, seed=11, sharp=2.0), 3)


DRAFTERS: dict[str, Any] = {
    "ngram": "ngram",
    "suffix": "suffix",
    "recycle": "recycle",
    "jacobi": "jacobi:3",
    "model": model,
    "eagle": eagle,
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_every_kind_of_drafter_drafts_behind_images(name: str) -> None:
    """By text alone: they see the processor's placeholders, and what they propose does not change the text."""
    engine = engine_of("qwen2_5_vl")
    made = DRAFTERS[name]
    drafter = made if isinstance(made, str) else made(engine.parts.target)
    drafted = companion(engine, drafter, length=3)
    assert decoded(drafted, prompts_of("qwen2_5_vl")) == expected("qwen2_5_vl")
    assert not drafted.defects and drafted.counts.proposed


def test_samples_have_the_models_distribution() -> None:
    """Pairs of tokens against transformers' logits, by Weissman's bound on the distance of an empirical distribution: a false alarm
    has a chance of one in a billion. The same pairs are not those of another image."""
    kit, engine, n, top = small("qwen2_5_vl"), engine_of("qwen2_5_vl"), 1000, 3
    text, each = f"a {kit.mark} b", 50
    draws = [
        SamplingParams(max_tokens=3, n=each, top_k=top, temperature=1.0, seed=i, ignore_eos=True)
        for i in range(n // each)
    ]
    drafted = companion(engine, "jacobi:2", length=2, slots=each)
    found = drafted.generate([engine.images.read(text, [picture(1)])] * len(draws), draws)
    got = Counter(tuple(output.token_ids[:2]) for result in found for output in result.outputs)
    assert drafted.counts.accepted and drafted.counts.rejected

    def exact(image: Any) -> dict[tuple[int, ...], float]:
        out: dict[tuple[int, ...], float] = {}
        first = kit.logits(text, [image], []).topk(top)
        for token, p in zip(first.indices.tolist(), first.values.softmax(-1).tolist(), strict=True):
            second = kit.logits(text, [image], [token]).topk(top)
            for then, q in zip(second.indices.tolist(), second.values.softmax(-1).tolist(), strict=True):
                out[token, then] = p * q
        return out

    def far(right: dict[tuple[int, ...], float]) -> float:
        return sum(abs(got[pair] / n - right.get(pair, 0.0)) for pair in {*got, *right})

    bound = math.sqrt(2 * (top * top * math.log(2) + math.log(1e9)) / n)
    assert far(exact(picture(1))) < bound < far(exact(picture(9)))


# ------------------------------------------------------------------------------------------------ beginnings and memory
def test_equal_images_share_and_others_do_not() -> None:
    """Prompts with the same tokens and other pixels share nothing; the vision part runs once for each image."""
    kit = small("gemma3")
    target = HFTarget(kit.model)
    reader = images_of(target, kit.processor)
    assert isinstance(reader, HFImages)
    calls: list[int] = []
    target.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    engine = Engine.build(
        target=target, tokenizer=kit.processor, draft="none", length=0, slots=2, max_length=300, chunk=64
    )
    tail = "the same long text behind it " * 4
    first, again, other = (engine.images.read(f"{kit.mark}{tail}", [picture(n)]) for n in (1, 1, 2))
    assert list(first) == list(again) == list(other)
    one = decoded(engine, [first])
    tried = len(calls)
    sums = engine.state.room.sums
    assert decoded(engine, [again]) == one and len(calls) == tried and sums.reused == 64
    decoded(engine, [other])
    assert len(calls) == tried + 1 and sums.reused == 64
    assert decoded(engine, [other]) != one or kit.text(f"{kit.mark}{tail}", [picture(2)], NEW) == one[0]


def test_rows_of_images_that_nobody_has_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = small("gemma3")
    target = HFTarget(kit.model)
    reader = images_of(target, kit.processor)
    assert isinstance(reader, HFImages)
    prompts = [reader.read(kit.mark, [picture(n)]) for n in range(5)]
    rows = [reader.rows(prompt.images[0]) for prompt in prompts]
    assert len({r.key for r in rows}) == 5 and reader.rows(prompts[0].images[0]) is rows[0]
    monkeypatch.setattr("outrider.models.hf.images.KEPT", 2 * rows[0].nbytes)
    assert reader.rows(prompts[4].images[0]) is rows[4]
    calls: list[int] = []
    target.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    assert [reader.rows(p.images[0]) for p in prompts] == rows and not calls, "somebody has them: none is seen again"
    key, embeds = rows[1].key, rows[1].embeds.clone()
    rows.clear()
    again = reader.rows(prompts[1].images[0])  # seen anew, under the same key
    assert calls == [1] and again.key == key and torch.equal(again.embeds, embeds)


def test_rotary_positions_are_the_models_own() -> None:
    """Of a prompt with several images, put together from each image alone."""
    kit = small("qwen2_5_vl")
    engine = engine_of("qwen2_5_vl")
    for text, images in asked(kit.mark):
        prompt = engine.images.read(text, images)
        given = kit.inputs(text, images)
        right, _ = kit.model.model.get_rope_index(**{k: v for k, v in given.items() if k != "pixel_values"})
        own = Pictured(tuple(map(engine.images.rows, prompt.images)), tuple(i.first for i in prompt.images))
        assert own.axes == 3 and torch.equal(own.turns(0, len(prompt)), right[:, 0])
        assert torch.equal(own.turns(5, 9), right[:, 0, 5:9])
        assert own.shift(len(prompt)) == int(right.max()) + 1 - len(prompt)


def test_chunks_end_behind_open_images() -> None:
    image = ImageRows(1 << 40, 6, tuple(range(6)), torch.zeros(6, 2), None, 6, ((0, 6),))
    own = Pictured((image, image), (3, 20))
    assert [own.whole(n) for n in (3, 4, 8, 9, 12, 20, 21, 26)] == [3, 9, 9, 9, 12, 20, 26, 26]
    assert [own.before(n) for n in (3, 4, 8, 9, 21)] == [3, 3, 3, 9, 20]
    assert own.keyed(list(range(30)))[2:10] == [2, *range(1 << 40, (1 << 40) + 6), 9]


# ------------------------------------------------------------------------------------------------ what is refused
def test_a_text_model_takes_no_images() -> None:
    engine = Engine.build(target=TinyLM(40, 16, 1, seed=1), draft="none", length=0, slots=1, max_length=40)
    with pytest.raises(CapabilityError, match="reads no images"):
        _ = engine.images


def test_texts_that_images_open_are_refused() -> None:
    """A prompt that sees itself whole (a text marked as an image, here) cannot be read in chunks."""
    reader, kit = engine_of("gemma3").images, small("gemma3")
    image = reader.read(f"a text {kit.mark} and more", [picture(11)]).images[0]
    image.tensors["token_type_ids"].fill_(1)
    with pytest.raises(CapabilityError, match="beyond each image itself"):
        reader.rows(image)


def test_images_larger_than_a_window_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of two cuts an image of four rows, as it cuts a text; the trial, whose image may be smaller, has passed."""
    reader, kit = images_of(HFTarget(small("gemma3").model), small("gemma3").processor), small("gemma3")
    assert isinstance(reader, HFImages)
    reader.prove()
    image = reader.read(f"a text {kit.mark} and more", [picture(12)]).images[0]
    monkeypatch.setattr(reader.target.model.config.get_text_config(decoder=True), "sliding_window", 2)
    with pytest.raises(CapabilityError, match="image of 4 rows is larger than a window"):
        reader.rows(image)


@pytest.mark.slow
def test_a_model_that_needs_more_than_embeddings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3-VL without what its deeper layers add to the rows of images: the trial finds it."""
    kit = small("qwen3_vl")
    reader = images_of(HFTarget(kit.model), kit.processor)
    assert reader is not None
    real = ImageRows.__init__
    monkeypatch.setattr(ImageRows, "__init__", lambda self, *given: real(self, *given[:7]))
    with pytest.raises(CapabilityError, match="differently in chunks"):
        reader.rows(reader.read(kit.mark, [picture(1)]).images[0])


def test_texts_that_do_not_fit_their_images_are_refused() -> None:
    reader = engine_of("idefics3").images
    for text, images, why in (
        ("no mark", [picture(1)], "0 places for images"),
        ("<image><image>", [picture(1)], "2 places for images"),
        ("<image>", [], "at least one"),
        ("<image>" * 33, [picture(1)] * 33, "at most 32"),
        ("<image>", [b"nothing"], "no PNG"),
    ):
        with pytest.raises(RequestError, match=why):
            reader.read(text, images)
    engine = engine_of("idefics3")
    with pytest.raises(RequestError, match="the context holds"):
        engine.generate([reader.read("<image>" + "x" * 700, [picture(1)])], GREEDY)
