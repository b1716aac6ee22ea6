"""Somebody with a laptop: installed, seen, an own model checked and talked to, measured, and what goes wrong on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from steps import documented, journey, need, refused, run, terminal

FEW = "--count 3 --max-tokens 16"


def shipped() -> Path:
    """The folder of the shipped pair, as installed."""
    return Path(run("""python -c 'from outrider.assets import shipped; print(shipped("target").parent)'""").out.strip())


def first_minutes() -> None:
    run("outrider --version").says(r"^outrider \d")
    top = run("outrider -h").out
    need(top == run("python -m outrider -h").out, "`python -m outrider` is not the command `outrider`")
    terminal("outrider -h")
    for command in ("generate", "bench", "serve", "train", "ab run", "theory speedup"):
        run(f"outrider {command} -h").says(rf"Example: outrider {command}")
        terminal(f"outrider {command} -h")
    run(documented("first_hour.md", "outrider demo"), "--max-tokens 16 --prompts 2 --repeats 1").says(
        "identical, token by token"
    )


def texts() -> None:
    greedy = documented("first_hour.md", 'outrider generate "def main("')
    drafted, plain = run(greedy), run(greedy, "--draft none")
    need(drafted.out == plain.out, f"greedy text depends on the drafter: {drafted.out!r} and {plain.out!r}")
    last = drafted.err.strip().splitlines()[-1]
    need(
        "tokens/s" in last and "acceptance length" in last and "first token after" in last, f"the last line is {last!r}"
    )
    document = run(documented("first_hour.md", 'outrider generate "import os"')).json()
    need("outputs" in document or "text" in json.dumps(document), "no text in the document")
    run("outrider generate - --max-tokens 8", given="def f(x):\n")
    run("outrider chat --max-tokens 8", given="x = 1\n").says("tokens/s")


def own_model() -> None:
    pair, target = shipped(), Path("model")
    shutil.copytree(pair / "target", target)
    run("outrider doctor model", f"{pair / 'draft'}")
    terminal("outrider doctor model")
    run("outrider generate 'def f(' --target model --draft ngram --max-tokens 8")
    (target / "tokenizer.json").rename("tokenizer.json")
    same_refusal("model")
    Path("tokenizer.json").rename(target / "tokenizer.json")
    config = json.loads((target / "config.json").read_text())
    for change in (
        config | {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 100},
        {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 100},
    ):
        (target / "config.json").write_text(json.dumps(change))
        same_refusal("model")


def same_refusal(folder: str) -> None:
    """What `generate` refuses, `doctor` says in the same words."""
    said = run(f"outrider generate x --target {folder}", code=2).err.removeprefix("outrider: ").strip()
    found = run(f"outrider doctor {folder}", code=(1, 2))
    why = said.split(": ", 1)[-1]
    need(
        why in " ".join((found.out + found.err).split()), f"generate says {said!r}, doctor says {found.out}{found.err}"
    )


def measured() -> None:
    bench = documented("first_hour.md", "outrider bench")
    run(bench, f"{FEW} --warmup 0")
    terminal(bench, f"{FEW} --warmup 0")
    run(documented("first_hour.md", "outrider predict"), FEW)
    run(
        documented("first_hour.md", "outrider plan"),
        f"{FEW} --count 4 --rounds 2 --requests 20 --lengths 0,2",
        code=(0, 1, 3),
    )


def wrong() -> None:
    refused("outrider generate x --target ./nosuch", "there is no folder ./nosuch")
    refused("outrider bench --target ./nosuch", "there is no folder ./nosuch")
    refused("outrider bench --draft ./nosuch", "there is no ./nosuch")
    refused("outrider predict --from-logs nosuch.jsonl", "no such file")
    refused("outrider bench --prompts nosuch.jsonl", "no such file")
    refused("outrider bench --out .", "is a folder")
    refused("outrider bench --lengths 0,99", "from 0 to 64")
    run("outrider generate", code=2).says("prompt is")  # missing; empty, where nobody sits at a terminal
    run("outrider generate x --nosuch", code=2).says("No such option")
    run("outrider nosuch", code=2)


if __name__ == "__main__":
    journey("laptop", first_minutes, texts, own_model, measured, wrong)
