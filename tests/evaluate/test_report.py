"""The HTML page of a measured run: whole, self-contained, nothing fetched or run."""

from __future__ import annotations

import math
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.cli.main import main
from outrider.evaluate.bench.report import unfinished
from outrider.evaluate.experiments.experiment import Comparison
from outrider.evaluate.html import lines
from outrider.evaluate.statistics.sequential import Bounds


class Outside(HTMLParser):
    """Collects whatever a page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs) -> None:
        fetches = any(
            (k in ("src", "href") and not str(v).startswith(("data:", "#"))) or k.startswith("on") for k, v in attrs
        )
        if fetches or tag in ("script", "link", "iframe"):
            self.found.append(tag)


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "run.html"
    small = ["--count", "2", "--repeats", "1", "--warmup", "0", "--lengths", "0,2", "--max-tokens", "12"]
    monkeypatch.setattr(sys, "argv", ["outrider", "bench", *small, "--html", str(file)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    page = file.read_text()
    outside = Outside()
    outside.feed(page)
    assert outside.found == []
    assert "length 2" in page and "plain" in page
    assert page.count("<svg") >= 1


def test_conversations_that_ended_early_are_counted() -> None:
    records: list[Any] = [SimpleNamespace(shortened=n) for n in (0, 2, 1)]
    assert [": 3." in text for text in unfinished(records)] == [True]
    assert unfinished(records[:1]) == []


def test_an_open_interval_has_no_place_on_an_axis() -> None:
    """Too few groups: no number stands for infinity, which would be the only thing that the axis shows."""
    opened = Comparison("a", Bounds(2, 0.1, -math.inf, math.inf), None, (), "undecided")
    bounded = Comparison("a", Bounds(9, 0.1, -0.2, 0.4), None, (), "undecided")
    wide = Comparison("a", Bounds(8, 0.1, -60.0, 60.0), None, (), "undecided")
    assert opened.ratio[2] == math.inf
    assert lines("x", {"a": [(2.0, *opened.ratio)]}, "groups", (1.0,)) == "<p>Too few prompts for an interval.</p>"
    seen = lines("x", {"a": [(float(c.speed.n), *c.ratio) for c in (opened, wide, bounded)]}, "groups", (1.0,))
    assert "e+" not in seen and f">{2 * math.exp(0.4) - math.exp(0.1):.3g}<" in seen  # twice the last interval
