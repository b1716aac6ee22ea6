"""Somebody who trains drafters: what it will cost, a drafter, another beside it, one that was interrupted, and how it is used."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

from steps import documented, journey, need, refused, run, terminal, words

SMALL = "--rows 24 --held-out 4 --length 48 --prompt 16 --steps 6 --batch 4 --save-every 2"
DATA = "--data texts"


def written() -> None:
    """Some text of one's own."""
    Path("texts").mkdir(exist_ok=True)
    for i in range(60):
        lines = (f"def function_{i}_{j}(x, y):\n    return x + y * {i + j}\n\n" for j in range(40))
        Path(f"texts/{i}.py").write_text("".join(lines), encoding="utf-8")


def costs() -> None:
    written()
    line = documented("train.md", "outrider train eagle --target my/model --data texts/ --dry-run").replace(
        "--target my/model", ""
    )
    run(line, SMALL)
    terminal(line, SMALL)


def trained() -> None:
    written()
    run(documented("train.md", "outrider train medusa --out my/medusa"), f"{DATA} {SMALL}")
    line = documented("train.md", "outrider train eagle --target my/model --data texts/ --pattern")
    line = line.replace("--target my/model", "").replace("--data chats.jsonl", "").replace("'*.md'", "'*.py'")
    run(line, SMALL)  # in the same work folder, on the same text
    need(
        Path("my/medusa/model.safetensors").exists() and Path("my/eagle/model.safetensors").exists(),
        "no drafter was written",
    )
    run("outrider generate 'def f(' --draft medusa:my/medusa --length 2 --max-tokens 16").says("tokens/s")
    run(
        documented("train.md", "outrider bench --draft medusa:my/medusa"),
        "--count 2 --max-tokens 8 --repeats 1 --warmup 0",
    )
    run("outrider bench --draft my/medusa --lengths 0,2 --count 2 --max-tokens 8 --repeats 1 --warmup 0")


def continued() -> None:
    """Interrupted by Ctrl-C in the middle; the same command goes on from there, to the end."""
    written()
    line = f"outrider train draft {DATA} {SMALL} --steps 1200 --blocks 1 --width 64 --work kept --out my/continued"
    child = subprocess.Popen(words(line), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 600
    while not list(Path("kept").rglob("step-*")) and time.monotonic() < end:
        need(child.poll() is None, f"it ended by itself: {child.returncode}")
        time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    need(child.returncode == 130 and "Traceback" not in err, f"Ctrl-C: {child.returncode} {err}")
    need("the same command goes on" in err, f"Ctrl-C does not say how it goes on: {err}")
    run(line).says(r"continuing from step-\d+")
    need(Path("my/continued/model.safetensors").exists(), "no drafter was written")


def wrong() -> None:
    refused("outrider train medusa --target ./nosuch", "there is no folder ./nosuch")
    refused("outrider train medusa --data nosuch.txt", "no such file")
    run("outrider train nosuch", code=2).says("unknown drafter to train")


if __name__ == "__main__":
    journey("training", costs, trained, continued, wrong)
