"""Every family of the installed transformers that can continue text: does it run here, how, how fast, and is its text the same?

    python benchmarks/model_table.py [llama mamba ...] --out rows.jsonl [--tokens 48] [--rounds 3] [--seconds 240]

Each family is built small and random (seeded, a few layers of 64), saved as a checkpoint, loaded as any checkpoint is, and
decoded greedily: by transformers' own `generate`, plainly, with n-gram drafts, and with drafts of its own text in which every
fifth token is wrong. A family takes a process of its own, and its row is written when it is done: a run that was stopped goes
on where it was. `benchmarks/model_page.py` makes the page of the rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from outrider import Engine, SamplingParams
from outrider.build import companion
from outrider.drafters.tree.forest import chains
from outrider.errors import OutriderError
from outrider.models.load import inspect_checkpoint
from outrider.types import Draft, Evidence

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: the families' sizes lie beside it
from benchmarks.model_sizes import FAMILIES, VOCAB, build

PROMPT = [7 * i % 90 + 5 for i in range(24)]


class Told:
    """Drafts a known text in which every fifth token is wrong: drafts are accepted, and rejected, whatever the model."""

    name, layers, trees = "told", (), False

    def __init__(self, text: Sequence[int], depth: int) -> None:
        self.text = [t if i % 5 else (t + 1) % VOCAB for i, t in enumerate(text)]
        self.max_depth = self.max_nodes = depth

    def bind(self, slots: int, length: int) -> None: ...

    def release(self, slots: Sequence[int]) -> None: ...

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        found = []
        for view, most in zip(evidence.sequences, budget, strict=True):
            at = len(view.tokens) - view.prompt
            found.append(self.text[at : at + min(most, self.max_depth)])
        return chains(found, evidence.scores.logits.device)


def decode(engine: Engine, tokens: int, **how: Any) -> list[int]:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, **{"temperature": 0.0, **how})
    return list(engine.generate([PROMPT], params)[0].outputs[0].token_ids)


@torch.no_grad()
def reference(model: Any, tokens: int) -> list[int]:
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=tokens, do_sample=False)
    return out[0, len(PROMPT) :].tolist()


def row_of(family: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Everything about one family; `made` says why there was nothing to try, `refused` why it does not run."""
    row: dict[str, Any] = {"family": family, "transformers": transformers.__version__}
    try:
        model = build(family)
    except Exception as error:  # a class of transformers may fail in any way on sizes that it does not like
        return row | {"made": said(error)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except Exception as error:
            return row | {"made": said(error)}
        row["type"] = json.loads((Path(folder) / "config.json").read_text())["model_type"]
        row["doctor"] = doctor(folder)
        try:
            engine = Engine.build(target=folder, draft="none", length=0, slots=1, dtype="float32", max_length=256)
        except OutriderError as error:
            return row | {"refused": plainly(error, folder), **own_fault(model)}
        row |= compare(model, engine, tokens, rounds)
    return row


def doctor(folder: str) -> str:
    """The runtime of a checkpoint as `outrider doctor` has it from the files alone, or its refusal."""
    try:
        return inspect_checkpoint(folder, dtype="float32").runtime
    except OutriderError as error:
        return f"refused: {plainly(error, folder)}"


def own_fault(model: Any) -> dict[str, str]:
    """Whether transformers itself fails on it."""
    try:
        reference(model, 2)
    except Exception as error:
        return {"theirs_fails": said(error)}
    return {}


def compare(model: Any, engine: Engine, tokens: int, rounds: int) -> dict[str, Any]:
    target = engine.parts.target
    path = getattr(target, "path", "native" if getattr(target, "native", None) is not None else "lean")
    drafts = "none" if not target.rewinds else "trees" if target.trees else "chains"
    one = bool(getattr(getattr(target, "serving_path", None), "by_token", False))
    out: dict[str, Any] = {"path": path, "drafts": drafts, "by_token": one}
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    plain = decode(engine, tokens)
    try:
        theirs: list[int] | None = reference(model, tokens)
    except Exception as error:
        theirs, out["theirs_fails"] = None, said(error)
    if theirs is not None:
        out["equal"] = plain == theirs
        if plain != theirs:
            out["first_difference"] = next(i for i, (a, b) in enumerate(zip(plain, theirs, strict=False)) if a != b)
        out |= speeds(model, engine, tokens, rounds)
    out["distinct"] = len(set(plain))
    if not target.rewinds:
        return out
    for name, drafter, length in (("ngram", "ngram", 4), ("told", Told(plain, 6), 6)):
        greedy = companion(engine, drafter, length=length)
        out[name] = decode(greedy, tokens) == plain
        sampled = companion(engine, drafter, length=length, rule="match")
        base = companion(engine, "none", length=0, rule="match")
        how = {"temperature": 1.0, "seed": 7}
        out[f"{name}_match"] = decode(sampled, tokens, **how) == decode(base, tokens, **how)
        out[f"{name}_accepted"], out[f"{name}_rejected"] = greedy.counts.accepted, greedy.counts.rejected
    return out


def speeds(model: Any, engine: Engine, tokens: int, rounds: int) -> dict[str, float]:
    """Seconds of the processor of both, by turns, and the median of their ratios. Nothing for no rounds."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for r in range(rounds):
        for name in ("ours", "theirs")[:: 1 if r % 2 else -1]:
            start = time.process_time()
            decode(engine, tokens) if name == "ours" else reference(model, tokens)
            seconds[name].append(time.process_time() - start)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    if not ratios:
        return {}
    return {n: round(statistics.median(s), 4) for n, s in seconds.items()} | {
        "speed": round(statistics.median(ratios), 3)
    }


def again(row: dict[str, Any], tokens: int, rounds: int) -> dict[str, Any]:
    """A row with its speed measured anew."""
    model = build(row["family"])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = Engine.build(target=folder, draft="none", length=0, slots=1, dtype="float32", max_length=256)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        decode(engine, tokens)  # both once, unmeasured
        reference(model, tokens)
        return row | speeds(model, engine, tokens, rounds)


def plainly(error: Exception, folder: str) -> str:
    return str(error).replace(folder, "the checkpoint").replace(Path(folder).name, "the checkpoint")


def said(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def _child(pipe: Any, family: str, tokens: int, rounds: int) -> None:
    try:
        pipe.send(row_of(family, tokens, rounds))
    except BaseException as error:
        pipe.send({"family": family, "transformers": transformers.__version__, "crash": said(error)})
    finally:
        pipe.close()


def alone(family: str, tokens: int, rounds: int, seconds: float) -> dict[str, Any]:
    """The row of a family, made in a process that is ended when it takes too long."""
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(its, family, tokens, rounds))
    process.start()
    its.close()
    try:
        if ours.poll(seconds):
            return ours.recv()
        return {
            "family": family,
            "transformers": transformers.__version__,
            "crash": f"not done in {seconds:.0f} seconds",
        }
    except EOFError:
        return {"family": family, "transformers": transformers.__version__, "crash": "its process died"}
    finally:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument(
        "--out", type=Path, required=True, help="rows, one JSON object a line; families in it are not run again"
    )
    for name, default in (("tokens", 48), ("rounds", 3), ("seconds", 240)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--again", type=float, default=0.0, help="measure anew the speed of rows below this, and nothing else"
    )
    wanted = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if wanted.again:
        rows = [json.loads(line) for line in wanted.out.read_text().splitlines()]
        for i, row in enumerate(rows):
            if row.get("speed", 9.0) < wanted.again and row["family"] in wanted.families and not row.get("cpu"):
                rows[i] = again(row, wanted.tokens, wanted.rounds) | {"cpu": True}
                print(json.dumps(rows[i]), flush=True)
                wanted.out.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return
    done = (
        {json.loads(line)["family"] for line in wanted.out.read_text().splitlines()} if wanted.out.exists() else set()
    )
    for family in (f for f in wanted.families if f not in done):
        row = alone(family, wanted.tokens, wanted.rounds, wanted.seconds)
        with wanted.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
