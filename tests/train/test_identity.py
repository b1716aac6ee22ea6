"""What a training rests on is kept whole: ids of any vocabulary, every choice in the name of a run, no row on both sides."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.none import NoDraft
from outrider.errors import ConfigError
from outrider.models.folder import identity_of
from outrider.models.toy import TinyLM
from outrider.train.data import Document, encode, halve, narrowed, token_type
from outrider.train.features import DataSpec, cut_prompts, write_tokens
from outrider.train.job import ELSEWHERE, Job
from outrider.train.keyed import part_folder, run_folder
from outrider.train.labels import weights_of, write_labels
from outrider.train.loop import BOOKKEEPING, LoopConfig
from outrider.train.pipeline import texts_of
from outrider.verify import load_rule

LARGE = 70_001


def job(tmp_path: Path, **changes: object) -> Job:
    made = Job(
        kind="eagle",
        target="target",
        data=(tmp_path,),
        work=tmp_path / "work",
        out=tmp_path / "out",
        loop=LoopConfig(steps=3, lr=1e-3),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("vocab", "kind"), [(65_536, np.uint16), (65_537, np.uint32), (152_064, np.uint32)])
def test_the_type_of_tokens_holds_every_id(vocab: int, kind: type) -> None:
    assert token_type(vocab) == kind
    assert narrowed([0, vocab - 1], token_type(vocab)).tolist() == [0, vocab - 1]


@pytest.mark.parametrize("bad", [[65_536], [3, -1]])
def test_an_id_that_does_not_fit_is_refused(bad: list[int]) -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        narrowed(bad, np.dtype(np.uint16))


def test_text_of_a_large_vocabulary_is_stored_as_it_was_written(tmp_path: Path) -> None:
    engine = Engine(TinyLM(LARGE, 4, 1, heads=1), NoDraft(), load_rule("block"), Fixed(0), slots=2, max_length=32)
    ids, own = [LARGE - 1 - i for i in range(16)], engine.encode
    engine.encode = lambda text: ids if isinstance(text, str) else own(text)  # type: ignore[method-assign]
    rows = write_tokens(engine, [Document("a", "x\n" * 50)], DataSpec(2, 4, 8), tmp_path, report=lambda _: None)
    assert rows[:, :4].tolist() == [ids[:4]] * 2


def test_a_stream_of_a_large_vocabulary_keeps_its_ids() -> None:
    class Wide:
        def __len__(self) -> int:
            return LARGE

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [LARGE - 2]

    assert encode([Document("a", "x")], Wide(), LARGE - 1).tolist() == [LARGE - 2, LARGE - 1]


OTHER = {
    "kind": "eagle1", "prompt": 32, "length": 128, "temperature": 0.5, "batch": 4, "levels": 3, "blocks": 2, "width": 64,
    "anchors": 8, "objective": "uniform", "labels": "tokens", "loss": "tv", "start": "first", "repeats": 0.25,
}  # fmt: skip


def test_every_choice_of_a_training_has_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    """Field by field, those of the loop too: another value, another folder; none is left out but what is named elsewhere."""
    base, parts, taps = job(tmp_path), [tmp_path / "a", tmp_path / "b"], (2, 3)
    place = lambda j, t=taps: run_folder(tmp_path, "eagle", parts, Job.choices(j, t))  # noqa: E731
    assert place(base) == place(replace(base, work=tmp_path / "w", slots=3))
    changed = {f.name for f in fields(Job)} - ELSEWHERE - {"loop", "taps"}
    assert changed == set(OTHER), "a new field of Job needs a value here"
    (tmp_path / "first").mkdir()
    for name, value in {**OTHER, "start": str(tmp_path / "first")}.items():
        other = job(tmp_path)
        object.__setattr__(other, name, value)  # whatever else a kind would refuse
        assert place(other) != place(base), name
    assert place(base, (1, 3)) != place(base)
    for f in fields(LoopConfig):
        odd = {"betas": (0.8, 0.9), "autocast": True, "compile": True, "final_lr_ratio": 0.5}
        given = odd[f.name] if f.name in odd else getattr(base.loop, f.name) + 1
        same = place(replace(base, loop=replace(base.loop, **{f.name: given}))) == place(base)
        assert same is (f.name in BOOKKEEPING), f.name


def test_a_single_text_is_cut_and_no_line_is_on_both_sides(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("".join(f"line {i}\n" for i in range(95)))
    found = texts_of(job(tmp_path, data=(tmp_path / "one.txt",)), lambda _: None)
    training, held_out = ([line for d in found[p] for line in d.text.splitlines()] for p in ("training", "held_out"))
    assert len(held_out) == 95 - round(0.9 * 95)
    assert not set(training) & set(held_out)
    assert len(training) + len(held_out) == 95


@pytest.mark.parametrize("count", [2, 3, 12])
def test_few_texts_are_never_on_both_sides(tmp_path: Path, count: int) -> None:
    for i in range(count):
        (tmp_path / f"{i}.txt").write_text(f"text {i}\n" * 3)
    found = texts_of(job(tmp_path), lambda _: None)
    sides = [{d.digest for d in found[p]} for p in ("training", "held_out")]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_one_line_cannot_be_held_out() -> None:
    with pytest.raises(ConfigError, match="give more text"):
        halve(Document("a.txt", "only\n"))


class Teacher(torch.nn.Module):
    """Logits from a table."""

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(scale * torch.randn(8, 8, generator=generator))
        self.config = SimpleNamespace(vocab_size=8)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def test_labels_of_another_target_are_not_gone_on_with(tmp_path: Path) -> None:
    tokens = torch.arange(24).view(4, 6) % 8
    write_labels(Teacher(0), tokens, tmp_path, report=lambda _: None)  # type: ignore[arg-type]
    write_labels(Teacher(0), tokens, tmp_path, report=lambda _: None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="another target"):
        write_labels(Teacher(1), tokens, tmp_path, report=lambda _: None)  # type: ignore[arg-type]


def test_a_logit_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="float16"):
        write_labels(Teacher(0, 1e6), torch.zeros(2, 4, dtype=torch.int64), tmp_path, report=lambda _: None)  # type: ignore[arg-type]


def test_a_model_is_told_from_one_that_differs_in_one_number(tmp_path: Path) -> None:
    """Anywhere in its weights, and in the tokenizer that makes its tokens."""
    weights = tmp_path / "model.safetensors"
    whole = np.random.default_rng(0).integers(0, 256, 5 << 20, dtype=np.uint8)
    weights.write_bytes(whole.tobytes())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    first = identity_of(tmp_path)
    for at in np.random.default_rng(1).integers(0, len(whole), 8):
        other = whole.copy()
        other[at] ^= 1
        weights.write_bytes(other.tobytes())
        assert identity_of(tmp_path) != first
    weights.write_bytes(whole.tobytes())
    assert identity_of(tmp_path) == first
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    assert identity_of(tmp_path) != first


def test_labels_tell_a_target_from_one_that_differs_in_one_weight() -> None:
    one = torch.nn.Linear(200, 100)
    known = weights_of(one)  # type: ignore[arg-type]
    for at in ((0, 1), (57, 101), (99, 199)):
        with torch.no_grad():
            one.weight[at] += 1.0
        assert weights_of(one) != known  # type: ignore[arg-type]
        with torch.no_grad():
            one.weight[at] -= 1.0


def test_labels_of_nobody_knows_whom_are_not_gone_on_with(tmp_path: Path) -> None:
    tokens = torch.arange(24).view(4, 6) % 8
    write_labels(Teacher(0), tokens, tmp_path, report=lambda _: None)  # type: ignore[arg-type]
    (tmp_path / "target").unlink()
    with pytest.raises(ConfigError, match="another target"):
        write_labels(Teacher(0), tokens, tmp_path, report=lambda _: None)  # type: ignore[arg-type]


def test_what_the_training_starts_from_is_not_held_out(tmp_path: Path) -> None:
    """Two texts with one heading: a row of the heading is on one side only, and so said where there is nothing else."""
    engine = Engine(TinyLM(300, 4, 1, heads=1), NoDraft(), load_rule("block"), Fixed(0), slots=2, max_length=32)
    engine.encode = lambda text: list(text.encode()) if isinstance(text, str) else text  # type: ignore[method-assign]
    wanted, heading = DataSpec(4, 8, 8), "a heading\n"
    begun = cut_prompts([Document("a", heading)], engine.encode, wanted)  # type: ignore[arg-type]
    held_out = [Document("b", heading), Document("c", heading + "and one line\nor two lines\n")]
    apart = {tuple(p) for p in begun}
    kept, all_of = (cut_prompts(held_out, engine.encode, wanted, x) for x in (apart, ()))  # type: ignore[arg-type]
    place = part_folder(tmp_path, "held_out", "target", held_out, wanted, kept)
    assert kept != all_of and place != part_folder(tmp_path, "held_out", "target", held_out, wanted, all_of)
    with pytest.raises(ConfigError, match="that the training does not have"):
        write_tokens(engine, held_out[:1], wanted, tmp_path / "none", lambda _: None, apart)
    rows = write_tokens(engine, [Document("d", "another\n" * 9), *held_out], wanted, place, lambda _: None, apart)
    assert not apart & {tuple(row) for row in rows.tolist()}
