"""The page of a watched server in a real browser: what the engine tells is drawn, what it does not is hidden and listed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from outrider.integrations.watch import Watch
from outrider.integrations.watch.app import Watching
from tests.serve.test_browser import CHROMIUM, FLAGS, wait
from tests.watch.server import PAGES, fake
from tests.watch.test_own_server import shown

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium")
ASKED = {
    "budget": 1000,
    "spent": 128,
    "requests": 2,
    "failed": 0,
    "ended": None,
    "acceptance": {
        "requests": 2,
        "acceptance_rate": 0.5,
        "by_length": [{"length": 1, "value": 1.7, "low": None, "high": None, "beyond": False}],
    },
    "replay": {"texts": 2, "length": 3, "observed": 21, "greedy": [21.0, 21.0, 21.0], "sampled": [17.5, 12.0, 23.0]},
    "audit": {
        "outcome": "exact so far",
        "sentence": "exact so far: <b>0.1</b>",
        "log10_evidence": -0.5,
        "tokens": 128,
        "level": 0.01,
    },
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as one:
        chromium = one.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp"])
@pytest.mark.parametrize("size", [(1400, 900), (390, 800)])
def test_what_is_told_is_drawn_and_the_rest_is_hidden(browser: Any, engine: str, size: tuple[int, int]) -> None:
    with fake(PAGES[engine]) as server:
        watching = Watching(Watch(server.url), every=0.2, asked=lambda: ASKED)
        with shown(watching) as url:
            page = browser.new_page(viewport={"width": size[0], "height": size[1]})
            problems: list[str] = []
            page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda e: problems.append(str(e)))
            page.goto(f"{url}/?theme=light")
            wait(
                page,
                "document.getElementById('exact').textContent.length > 3 && !document.getElementById('untold').hidden",
            )
            wait(page, "document.getElementById('len').textContent !== '-'")
            length = {"vllm": "3.13", "sglang": "2.52", "llamacpp": "1.43"}[engine]
            assert page.inner_text("#len") == length
            hidden = set(
                page.eval_on_selector_all("[data-needs]", "all => all.filter(x => x.hidden).map(x => x.dataset.needs)")
            )
            assert {"play", "requests", "speeds", "phases", "ledger", "pareto"} <= hidden
            assert ("positions" in hidden) == (engine != "vllm") and ("outcomes" in hidden) == (engine == "llamacpp")
            assert page.evaluate("document.querySelectorAll('#pos rect').length") == (3 if engine == "vllm" else 0)
            assert "exact so far: <b>0.1</b>" in page.inner_text("#asked") and "1.70" in page.inner_text("#lengths")
            assert "expects 21 if drafts are greedy, 18 (12 to 23)" in page.inner_text("#asked")
            assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
            assert problems == []
            page.close()
