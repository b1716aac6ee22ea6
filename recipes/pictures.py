"""Pictures of what users see: the table of `outrider demo` as SVG, and pages in Chromium as PNG.

    python recipes/pictures.py [demo] [page]                # into docs/figures: demo.svg; serve_dark.png and serve_phone.png
    python recipes/pictures.py watch URL [OPTION ...]       # watch.png, of `outrider watch URL OPTION ...` beside a running server

demo: runs the command and draws what it printed. page: starts a server on a free port, sends it some requests and takes pictures
on a desktop and on a phone. watch: after two minutes (Debian's `chromium`, and `pip install playwright`; see `make test-browser`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import IO, Any

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
OUTRIDER = [sys.executable, "-m", "outrider"]
DEMO = ["demo", "--temperature", "0", "--length", "4"]
WIDTH = 112
PROMPTS = ("def read_config(path):\n", "class Stack:\n", "import os\n", "for line in lines:\n")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
WATCHED = 120
"""Seconds that a watch has for its first texts."""


def draw_demo() -> Path:
    """What `outrider demo` prints on a terminal of 112 columns, colours included."""
    from rich.console import Console
    from rich.text import Text

    given = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    shown = {**given, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    done = subprocess.run([*OUTRIDER, *DEMO], env=shown, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    screen = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True, color_system="truecolor")
    screen.print(Text(f"$ outrider {' '.join(DEMO)}", style="bold"))
    screen.print(
        Text.from_ansi(done.stdout.decode().rstrip()), end="\n\n"
    )  # without an empty last line, "g" is cut at its foot
    path = FIGURES / "demo.svg"
    svg = screen.export_svg(title="outrider demo", unique_id="outrider-demo")
    path.write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE), encoding="utf-8")
    return path


def draw_page() -> list[Path]:
    """The page of a server that has some traffic, with one text in its playground, on a desktop and on a phone."""
    with browser() as chromium, started("serve", "--port", "0") as url, ThreadPoolExecutor(4) as clients:
        pages = {name: chromium.new_page(viewport=size) for name, size in (("dark", DESKTOP), ("phone", PHONE))}
        for page in pages.values():
            page.goto(f"{url}/?theme=dark")
        traffic = [clients.submit(complete, url, PROMPTS[i % len(PROMPTS)]) for i in range(160)]
        while not all(t.done() for t in traffic):
            pages["dark"].wait_for_timeout(200)
        return [shot(play(page), f"serve_{name}.png") for name, page in pages.items()]


def draw_watch(*asked: str) -> Path:
    """The page of `outrider watch`."""
    with browser() as chromium, started("watch", "--port", "0", *asked) as url:
        page = chromium.new_page(viewport=DESKTOP)
        page.goto(f"{url}/?theme=light")
        page.wait_for_timeout(1000 * WATCHED)
        return shot(page, "watch.png")


@contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        raise SystemExit("Chromium is missing: apt-get install chromium")
    with sync_playwright() as one:
        yield one.chromium.launch(executable_path=found, args=FLAGS)


@contextmanager
def started(*command: str) -> Iterator[str]:
    """The address of a command that serves a page."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}  # as users have it
    with subprocess.Popen([*OUTRIDER, *command], stderr=subprocess.PIPE, text=True, env=env) as server:
        try:
            assert server.stderr is not None
            yield address(server.stderr)
        finally:
            server.terminate()


def shot(page: Any, name: str) -> Path:
    """The page as a PNG of few colours, where Pillow (which matplotlib brings) is there: a third of the size."""
    path = FIGURES / name
    page.screenshot(path=str(path), full_page=name != "serve_phone.png")
    with suppress(ImportError):
        from PIL import Image

        Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
    return path


def address(said: IO[str]) -> str:
    """Where a server is, from what it says once it answers."""
    for line in said:
        if found := re.search(r"http://\S+", line):
            return found.group()
    raise SystemExit("the server did not start")


def complete(url: str, prompt: str) -> None:
    body = json.dumps({"model": "pycode", "prompt": prompt, "max_tokens": 96}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        reply.read()


def play(page: Any) -> Any:
    """The page with one text in its playground, decoded to its end."""
    page.fill("#max", "120")
    page.fill("#prompt", PROMPTS[0])
    page.click("#go")
    end = time.monotonic() + 60
    while "ended" not in page.inner_text("#out2") and time.monotonic() < end:
        page.wait_for_timeout(50)
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(1500)
    return page


if __name__ == "__main__":
    if sys.argv[1:2] == ["watch"]:
        print(draw_watch(*sys.argv[2:]))
    else:
        for name in sys.argv[1:] or ("demo", "page"):
            print({"demo": draw_demo, "page": draw_page}[name]())
