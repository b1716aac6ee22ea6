"""The README's two pictures: the table of `outrider demo` as SVG, and the server's page in Chromium as PNG.

    python recipes/pictures.py [demo] [page]      # into docs/figures

demo: runs the command and draws what it printed. page: starts a server on a free port, sends it some requests and takes a picture
(Debian's `chromium`, and `pip install playwright`; see `make test-browser`).
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
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from typing import IO, Any

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
OUTRIDER = [sys.executable, "-m", "outrider"]
DEMO = ["demo", "--temperature", "0", "--length", "4"]
WIDTH = 100
PROMPTS = ("def read_config(path):\n", "class Stack:\n", "import os\n", "for line in lines:\n")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
SIZE = {"width": 1280, "height": 900}


def draw_demo() -> Path:
    """What `outrider demo` prints on a terminal of 100 columns, colours included."""
    from rich.console import Console
    from rich.text import Text

    shown = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    done = subprocess.run([*OUTRIDER, *DEMO], env=shown, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    screen = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True, color_system="truecolor")
    screen.print(Text(f"$ outrider {' '.join(DEMO)}", style="bold"))
    screen.print(Text.from_ansi(done.stdout.decode().rstrip()))
    path = FIGURES / "demo.svg"
    svg = screen.export_svg(title="outrider demo", unique_id="outrider-demo")
    path.write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE), encoding="utf-8")
    return path


def draw_page() -> Path:
    """The page of a server that has some traffic, with one text in its playground."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("Chromium is missing: apt-get install chromium")
    with subprocess.Popen([*OUTRIDER, "serve", "--port", "0"], stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            url = address(server.stderr)
            with sync_playwright() as one, ThreadPoolExecutor(4) as clients:
                page = one.chromium.launch(executable_path=chromium, args=FLAGS).new_page(viewport=SIZE)
                page.goto(f"{url}/?theme=light")
                traffic = [clients.submit(complete, url, PROMPTS[i % len(PROMPTS)], i) for i in range(160)]
                while not all(t.done() for t in traffic):
                    page.wait_for_timeout(200)
                play(page)
                path = FIGURES / "serve.png"
                page.screenshot(path=str(path))
        finally:
            server.terminate()
    return path


def address(said: IO[str]) -> str:
    """Where a server is, from what it says once it answers."""
    for line in said:
        if found := re.search(r"http://\S+", line):
            return found.group()
    raise SystemExit("the server did not start")


def complete(url: str, prompt: str, seed: int) -> None:
    body = json.dumps({"model": "pycode", "prompt": prompt, "max_tokens": 96, "seed": seed}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        reply.read()


def play(page: Any) -> None:
    """One text in the playground, to its end."""
    page.fill("#max", "120")
    page.fill("#prompt", PROMPTS[0])
    page.click("#go")
    end = time.monotonic() + 60
    while "ended" not in page.inner_text("#out2") and time.monotonic() < end:
        page.wait_for_timeout(50)
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(1500)


if __name__ == "__main__":
    for name in sys.argv[1:] or ("demo", "page"):
        print({"demo": draw_demo, "page": draw_page}[name]())
