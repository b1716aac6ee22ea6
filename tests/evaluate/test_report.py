"""The HTML page of a measured run: whole, self-contained, escaped."""

from __future__ import annotations

from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from outrider.evaluate.report import write_html


@dataclass
class Row:
    arm: str
    tokens: int
    seconds: float
    failed: int = 0


class Outside(HTMLParser):
    """Collects whatever a page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs) -> None:
        if tag in ("script", "link", "img", "iframe") or any(
            k in ("src", "href") or k.startswith("on") for k, _ in attrs
        ):
            self.found.append(tag)


def test_the_page_is_whole_escaped_and_fetches_nothing(tmp_path: Path) -> None:
    arm = {
        "name": "<script>alert(1)</script>",
        "tokens_per_second": 50.0,
        "phases": {"target": 1.0, "draft": 0.5, "rule": 0.1, "host": 0.1},
        "speedup": {"value": 1.5, "low": 1.2, "high": 1.8, "verdict": "faster"},
        "predicted_speedup": 1.4,
        "acceptance_length": 2.0,
        "ledger": {"predicted": 10.0, "observed": 11, "low": 5.0, "high": 15.0, "agrees": True},
    }
    document = {
        "command": "outrider bench <b>",
        "machine": {"cores": 2},
        "drafter": "model",
        "rule": "block",
        "lossless": True,
        "temperature": 1.0,
        "max_tokens": 8,
        "batch": 1,
        "repeats": 2,
        "arms": [arm],
    }
    write_html(
        tmp_path / "deep" / "run.html", document, [Row(arm["name"], 10, 0.2), Row(arm["name"], 9, 0.0, failed=1)]
    )
    page = (tmp_path / "deep" / "run.html").read_text()
    outside = Outside()
    outside.feed(page)
    assert outside.found == []
    assert "1.50 (1.20 to 1.80), faster" in page
    assert page.count("<circle") == 1  # the failed run is an outcome, not a number
    assert "&lt;script&gt;" in page
