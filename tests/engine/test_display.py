"""What a notebook shows: results and engines as text, HTML and pictures, safe whatever is in a token; and names for editors."""

from __future__ import annotations

import inspect
from dataclasses import fields
from html.parser import HTMLParser
from typing import get_type_hints

import pytest

from outrider import Engine, SamplingParams, generate, markup
from outrider.build import build_engine, companion
from outrider.engine.outputs import Output, Result
from outrider.errors import ConfigError
from outrider.options import EngineKeywords, EngineOptions, types_of
from outrider.records import Counts
from outrider.telemetry.ledger import ledger


class Read(HTMLParser):
    """Texts and tags of a page; every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.titles, self.open = "", set[str](), list[str](), list[str]()
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert {name for name, _ in attrs} <= {"style", "title"}
        self.titles += [value or "" for name, value in attrs if name == "title"]
        if tag != "hr":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def engine() -> Engine:
    made = Engine.build(length=4, slots=2)
    made.generate(["def main("], SamplingParams(temperature=0.8, seed=1, max_tokens=48))
    return made


def output(pieces: list[str], origins: list[str]) -> Output:
    return Output(0, tuple(range(len(pieces))), "".join(pieces), "stop", Counts(), tuple(origins), pieces=tuple(pieces))


def test_a_text_is_shown_whole_and_its_tokens_by_origin(engine: Engine) -> None:
    result = engine.generate("class A:\n", SamplingParams(seed=3, max_tokens=40))[0]
    only = result.outputs[0]
    assert len(only.pieces) == len(only.token_ids) == len(only.origins) and "".join(only.pieces) == only.text
    page = Read(result._repr_html_())
    assert page.text.startswith(only.text)
    marked = [title.partition(": ")[2] for title in page.titles]
    shown = [o for o, piece in zip(only.origins, only.pieces, strict=True) if piece]
    assert marked == [markup.MEANINGS[o] for o in shown]
    assert len(set(marked)) > 1


def test_nothing_in_a_token_is_markup_or_a_command() -> None:
    nasty = ["<script>alert(1)</script>", "&lt;", "\x1b[2J", "\u202e", "'><img src=x onerror=y>", "\ud800", "a\nb"]
    page = Read(output(nasty, ["accepted"] * len(nasty))._repr_html_())
    assert page.tags <= {"div", "span", "i"}
    assert "<script>alert(1)</script>" in page.text and "&lt;" in page.text and "a\nb" in page.text
    assert not {"\x1b", "\u202e", "\ud800"} & set(page.text) and "\\x1b[2J" in page.text
    assert "\x1b" not in repr(output(nasty, ["accepted"] * len(nasty)))


def test_a_long_text_and_many_outputs_are_cut_and_say_so() -> None:
    long = output(["word "] * 50_000, ["sampled"] * 50_000)
    assert len(repr(long)) < 200 and len(long._repr_html_()) < 400_000
    assert "48000 tokens more" in long._repr_html_()
    many = Result("r", (1, 2), tuple(output(["x"], ["sampled"]) for _ in range(100)))
    assert "92 outputs more" in many._repr_html_() and "99 outputs more" in repr(many)
    Read(many._repr_html_())


def test_without_a_tokenizer_the_numbers_of_tokens_are_shown() -> None:
    page = Read(output(["", "", ""], ["sampled", "accepted", "bonus"])._repr_html_())
    assert page.text.startswith("0 1 2 ")


def test_an_engine_says_what_it_is_and_what_it_counted(engine: Engine) -> None:
    book, page = ledger(engine.counts), Read(engine._repr_html_())
    for said in (engine.parts.drafter.name, engine.parts.rule.name, f"{book.observed} observed", *engine.notices):
        assert said in page.text
    line = repr(engine)
    assert engine.parts.rule.name in line and f"{engine.steps} steps" in line and "\n" not in line
    fresh = companion(engine, "none", length=0)
    assert "observed" not in Read(fresh._repr_html_()).text


def test_pictures_show_the_sums(engine: Engine) -> None:
    left, right = engine.plot().axes
    heights = [bar.get_height() for bar in left.patches]
    counts = engine.counts
    assert heights == [a / j for a, j in zip(counts.accepted_at, counts.judged_at, strict=True) if j]
    assert right.lines[-1].get_ydata()[0] == counts.rejected
    result = engine.generate("def area(", SamplingParams(seed=2, max_tokens=24))[0]
    (ax,) = result.plot().axes
    steps = ax.lines[0].get_ydata()
    assert len(steps) == result.outputs[0].counts.steps + 1 and steps[-1] == len(result.outputs[0].token_ids)
    assert result.plot()._repr_png_().startswith(b"\x89PNG")


def test_without_matplotlib_a_picture_says_what_to_install(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"outrider\[plot\]"):
        engine.plot()


def test_progress_is_told_and_ends_at_one(engine: Engine) -> None:
    told: list[float] = []
    engine.generate(["a = ", "b = "], SamplingParams(seed=1, max_tokens=12), progress=told.append)
    assert told == sorted(told) and len(told) > 2 and told[-1] == 1.0 and told[0] < 1.0


def test_editors_complete_every_option() -> None:
    """The static names are the options that exist, with their types, and the live signature has their defaults."""
    hints, defaults = get_type_hints(EngineKeywords), {f.name: f.default for f in fields(EngineOptions)}
    own = {"target", "draft", "rule"}
    assert set(hints) | own == set(defaults) and not set(hints) & own
    for name, hint in hints.items():
        bare = set(getattr(hint, "__args__", (hint,))) - {type(None)}
        assert bare == set(types_of(name)), name
    for function in (Engine.build, build_engine, companion, generate):
        found = inspect.signature(function).parameters
        assert {name: found[name].default for name in hints} == {name: defaults[name] for name in hints}
        assert all(p.kind is not p.VAR_KEYWORD for p in found.values())
