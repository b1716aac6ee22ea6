"""The page in a real browser: Debian's Chromium driven by Playwright. `make test-browser` installs both; skipped without them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider.cli.serve import past_of
from outrider.evaluate.store.store import Store
from outrider.telemetry.alerts import CONDITIONS, WindowSample
from tests.serve.harness import Running, serving, until

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as one:
        chromium = one.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def wait(page: Any, expression: str, seconds: float = 30.0) -> None:
    """Until an expression holds in the page; not in the page's own loop, which its content security policy forbids."""
    until(lambda: page.wait_for_timeout(30) or page.evaluate(expression), seconds)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1400, 900), (390, 800)])
def test_the_page_streams_and_colours(server: Running, browser: Any, theme: str, size: tuple[int, int]) -> None:
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    problems: list[str] = []
    page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    asked: list[str] = []
    page.on("request", lambda r: asked.append(r.url))
    page.goto(f"{server.url}/?theme={theme}")
    wait(page, "document.getElementById('model').textContent === 'pycode'")
    page.fill("#max", "40")
    page.fill("#prompt", "def <b>read</b>(")
    page.click("#go")
    wait(page, "document.getElementById('out2').textContent.includes('ended')")
    kinds = page.eval_on_selector_all("#out span", "all => all.map(x => x.className)")
    assert kinds[0] == "p"
    assert {"accepted", "sampled"} <= set(kinds[1:]) <= {"accepted", "corrected", "bonus", "sampled"}
    assert page.eval_on_selector("#out", "x => x.querySelector('b') === null")  # text stays text
    wait(page, "document.getElementById('len').textContent !== '-'")
    wait(page, "document.querySelectorAll('#pos rect').length >= 1")
    assert page.evaluate("document.querySelectorAll('#watch tr').length") == len(CONDITIONS)
    assert page.inner_text("#watched") == f"{len(CONDITIONS)} alerts, none firing"
    assert "first token, median" in page.inner_text("#facts") and page.inner_text("#facts b:first-child")
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    assert all(url.startswith(server.url) for url in asked)
    assert problems == []
    page.close()


def test_alerts_cost_the_front_and_past_runs_are_shown(browser: Any, tmp_path: Path) -> None:
    with Store(tmp_path / "runs.db") as store:
        trial = store.begin("ab", "<i>trial</i>", {"arms": 2})
        verdict = {"comparisons": [{"arm": "two", "decision": "faster", "speed": {"mean": 0.1}}]}
        store.save_experiment("<i>trial</i>", trial, {"arms": 2}, verdict)
        store.finish(trial, verdict)
    with serving(slots=2, price=0.5, past=past_of(tmp_path / "runs.db")) as running:
        failing = running.watch.alerts
        trouble = WindowSample(judged=5000, rejected=1, accepted=4999, drafts=1667)
        running.watch.reading = lambda: trouble  # type: ignore[method-assign]
        failing.hold = 0.0
        body = {"model": "pycode", "prompt": "def f(", "max_tokens": 60, "ignore_eos": True}
        assert running.call("POST", "/v1/completions", body)[0] == 200
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(running.url)
        wait(page, "document.querySelectorAll('#alerts .info:not(.notice)').length === 1")
        assert "repetition loops" in page.inner_text("#alerts")
        assert (
            page.inner_text("#watched") == f"1 alert of {len(CONDITIONS)}"
            and page.inner_text("#watch tr:first-child td") == "info"
        )
        wait(page, "document.querySelectorAll('#par circle').length === 1")
        wait(page, "!document.getElementById('past').hidden")
        assert page.inner_text("#runs").split("\t")[2:] == ["<i>trial</i>", "done", "-", "two: faster, speed 11%"]
        assert "$" in page.inner_text("#facts") and "exact" in page.inner_text("#par2")
        trouble = WindowSample(judged=5000, rejected=1500, accepted=3500, drafts=1667)
        wait(page, "document.querySelectorAll('#alerts div:not(.notice)').length === 0")
        page.close()


def test_stop_in_the_playground_frees_the_slot(server: Running, browser: Any) -> None:
    page = browser.new_page()
    page.goto(server.url)
    wait(page, "document.getElementById('model').textContent === 'pycode'")
    page.fill("#max", "900")
    page.click("#go")
    wait(page, "document.querySelectorAll('#out span').length > 3")
    page.click("#stop")
    until(lambda: not server.bridge.tickets and server.bridge.engine.scheduler.free == 8)
    page.close()
