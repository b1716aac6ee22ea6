"""What `gguf_files.py` compares, and its results as Markdown: both engines on one GGUF file, plain and with a draft model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import native_llama
from .arms import PLAIN, ROOT, SPECULATIVE, Arm, Worker
from .rows import flat, predicted
from .stats import Speeds, arm_row, claim_row, describe_machine, ratio, speeds, table

WHEEL = "llama.cpp wheel"
"""The engine's name of arms that run a wheel beside those that are compiled here."""
BFLOAT = "ours, bf16"
"""The engine's name of our arm on the checkpoint that the file is made of."""
LONG = 512
"""Tokens of a long prompt."""
OURS, THEIRS = ("ours", PLAIN), ("llama.cpp", PLAIN)
DRAFTED, DRAFTED_THERE = ("ours", SPECULATIVE), ("llama.cpp", SPECULATIVE)
ROW, PAYS, PLAIN_GAIN = "row", "pays", "plain gain"
CLAIMS = (
    ("ours plain / llama.cpp plain", (OURS,), (THEIRS,), ROW),
    ("ours plain / ours bf16 plain", (OURS,), ((BFLOAT, PLAIN),), PLAIN_GAIN),
    ("ours speculative / ours plain", (DRAFTED,), (OURS,), ""),
    ("llama.cpp speculative / llama.cpp plain", (DRAFTED_THERE,), (THEIRS,), ""),
    ("ours speculative / best of llama.cpp", (DRAFTED,), (THEIRS, DRAFTED_THERE), PAYS),
    ("llama.cpp plain, compiled here / wheel", (THEIRS,), ((WHEEL, PLAIN),), ""),
    ("best of llama.cpp, compiled here / wheel", (THEIRS, DRAFTED_THERE), ((WHEEL, PLAIN), (WHEEL, SPECULATIVE)), ""),
)
"""Text, arms of the upper part, of the lower one, which goal."""


def arms(
    lengths: Sequence[int], sampled: bool, with_draft: bool, wheel: Path, checkpoint: Path | None = None
) -> list[Arm]:
    """All settings of both engines. sampled: llama.cpp also with drafts that are drawn, which pays at temperatures above 0.

    llama.cpp is the one that is compiled here, with a wheel beside it (plain, and drafts of three tokens) if that is there; the
    wheel alone, in all settings, where nothing is compiled. checkpoint: what the file is made of, which we decode too, plain.
    """
    lengths = lengths if with_draft else []
    made = [Arm("ours plain", "ours", PLAIN, _ours("ours", lengths), {"length": 0})]
    made += [Arm(f"ours {n}", "ours", SPECULATIVE, made[0].worker, {"length": n}) for n in lengths]
    if checkpoint is not None:
        worker = _ours("ours-bf16", [], target=str(checkpoint.resolve()))
        made.append(Arm("ours bf16 plain", BFLOAT, PLAIN, worker, {"length": 0}))
    if not native_llama.PROGRAM.exists():
        return made + _wheel("llama.cpp", wheel, lengths, sampled)
    made += _native(lengths, sampled)
    return made + (_wheel(WHEEL, wheel, [n for n in lengths if n == 3], sampled) if wheel.exists() else [])


def _ours(name: str, lengths: Sequence[int], **options: Any) -> Worker:
    env = {"PYTHONPATH": str(ROOT / "src")}
    return Worker(name, "worker_ours.py", Path(sys.executable), "torch", {"lengths": [0, *lengths], **options}, env)


def _native(lengths: Sequence[int], sampled: bool) -> list[Arm]:
    """The compiled server: OpenMP or its own threads, weights rearranged or as stored, tiles forced. Drafts with OpenMP only: else
    target and draft have a pool each, whose threads wait for each other's cores and take eight times as long."""

    def arm(name: str, pool: str = "openmp", env: dict[str, str] | None = None, **options: Any) -> Arm:
        options |= {"program": str(native_llama.PROGRAM), "libraries": str(native_llama.POOLS[pool])}
        script, python = "worker_llama_server.py", Path(sys.executable)
        worker = Worker(name.replace(" ", "-"), script, python, "", options, env or {}, native_llama.PROGRAM)
        return Arm(name, "llama.cpp", SPECULATIVE if options.get("length") else PLAIN, worker)

    made = [arm("llama.cpp plain"), arm("llama.cpp plain, own threads", "own")]
    made += [arm("llama.cpp plain, as stored", repack=False)]
    made += [arm("llama.cpp plain, as stored, tiles", env={"GGML_CPU_TILED_MM_FORCE": "1"}, repack=False)]
    for n in lengths:
        made.append(arm(f"llama.cpp {n}", length=n))
        if sampled:
            made.append(arm(f"llama.cpp {n} sampled", length=n, sampled=True))
    return made


def _wheel(engine: str, python: Path, lengths: Sequence[int], sampled: bool) -> list[Arm]:
    def arm(name: str, **options: Any) -> Arm:
        worker = Worker(name.replace(" ", "-"), "worker_xllama.py", python, "xllamacpp", options)
        return Arm(name, engine, SPECULATIVE if options.get("length") else PLAIN, worker)

    made = [arm(f"{engine} plain"), arm(f"{engine} plain, as stored", repack=False)]
    made += [arm(f"{engine} {n}", length=n) for n in lengths]
    return made + [arm(f"{engine} {n} sampled", length=n, sampled=True) for n in lengths if sampled]


def goal(which: str, kind: str, scenario: str, timed: dict[str, Any] | None, large: bool) -> float | None:
    """What is aimed at: kind is the file's type, such as q8_0. A prompt as fast as llama.cpp's; one row at most as long as its row
    (0.85 of it with 5 and 6 bits); with drafts at temperature 1, 1.8 times its best where our rows are flat and its are not; and of
    large files gains over bfloat16."""
    if f"{LONG} + " in scenario:
        return 1.0 if which == ROW else None
    if which == ROW:
        return 1.18 if kind[:2] in ("q5", "q6") else 1.0
    if which == PAYS and "temperature 1" in scenario:
        return 1.8 if timed is None or flat(timed) else 1.3
    return {"q8_0": 1.6, "q4_k": 2.6}.get(kind) if which == PLAIN_GAIN and large else None


def section(result: dict[str, Any], timed: dict[str, Any] | None = None) -> str:
    """One result file as Markdown: what ran where, the ratios, the speeds. timed: what gguf_rows.py found for the same file."""
    clock, setting = result["clock"], result["setting"]

    def of(scenario: str, kinds: tuple[tuple[str, str], ...]) -> Speeds:
        samples = result["samples"][scenario]
        return {
            n: speeds(rows, clock) for n, rows in samples.items() if tuple(result["arms"][n]) in kinds and any(rows)
        }

    rows = []
    for scenario in result["scenarios"]:
        for text, ours, theirs, which in CLAIMS:
            found = ratio(of(scenario, ours), of(scenario, theirs))
            if found is not None:
                wanted = goal(which, result["type"], scenario, timed, max(setting["files"].values()) >= 250e6)
                rows.append([*claim_row(text, scenario, wanted, found), str(found.rounds)])
    sizes = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in setting["files"].items())
    by = "the clock" if clock == "seconds" else "processor time"
    parts = [
        f"## {result['name']}.gguf\n",
        f"{sizes}. Prompts of {setting['prompt']} tokens, {setting['tokens']} new tokens, {setting['threads']} threads, by {by}, "
        f"{result['rounds']} rounds, {result['date']}.\n",
        f"    {result['command']}\n",
        f"Machine: {describe_machine(result['machine'])}. Versions: {_versions(result)}.\n",
        table(["ratio", "scenario", "median", "95% interval", "goal", "reached", "settings", "rounds"], rows) + "\n",
    ]
    if timed is not None:
        parts += [
            "What the times of [rows](#rows-of-gguf-files) and the tokens of a step predict for drafts, and what was measured:\n"
        ]
        parts += [_prediction(result, timed)]
    head = ["setting", "tokens/s", "10% to 90%", "tokens per target call", "rounds"]
    for scenario, samples in result["samples"].items():
        speeds_of = [arm_row(name, found, clock) for name, found in samples.items() if any(found)]
        parts.append(f"### {result['name']}.gguf, {scenario}\n\n{table(head, speeds_of)}\n")
    return "\n".join(parts)


def _prediction(result: dict[str, Any], timed: dict[str, Any]) -> str:
    """Our speed with drafts over plain decoding, beside what the times of rows and drafts and the tokens of a step predict."""
    lines = []
    for scenario, samples in result["samples"].items():
        for name, (engine, kind) in result["arms"].items():
            found = [s for s in samples.get(name, []) if s]
            if (engine, kind) == DRAFTED and found:
                tokens = sum(s["tokens"] for s in found) / sum(s["calls"] for s in found)
                length = int(name.rpartition(" ")[2])
                clock = result["clock"]
                got = ratio({name: speeds(samples[name], clock)}, {"plain": speeds(samples["ours plain"], clock)})
                assert got is not None
                wanted = predicted(timed, length, tokens)
                interval = f"{got.value:.2f} ({got.low:.2f} to {got.high:.2f})"
                lines.append([name, scenario, f"{tokens:.2f}", f"{wanted:.2f}", interval, f"{got.value / wanted:.2f}"])
    head = [
        "setting",
        "scenario",
        "tokens a step",
        "predicted",
        "measured / ours plain",
        "of the prediction (goal 0.95)",
    ]
    return table(head, lines) + "\n"


def _versions(result: dict[str, Any]) -> str:
    found = {name: version for worker in result["workers"].values() for name, version in worker["versions"].items()}
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
