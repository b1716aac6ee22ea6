"""The HTML page of a measured run: whole, self-contained, nothing fetched or run."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from outrider.cli.main import main


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
