"""`outrider doctor`: is this pair fit to run together, and what will it need?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from outrider.cli import paths, tables, terminal
from outrider.cli.engine_options import ENGINE
from outrider.cli.options import Json
from outrider.cli.takes import takes
from outrider.errors import ConfigError
from outrider.options import EngineOptions


@takes(ENGINE, "options", only=("dtype", "max_length"))
def doctor(
    options: EngineOptions,
    target: Annotated[
        str | None,
        typer.Argument(
            callback=paths.model,
            help="Target: a folder, a GGUF file or a Hub name. Default: the shipped pair.",
            show_default=False,
        ),
    ] = None,
    draft: Annotated[
        str | None, typer.Argument(callback=paths.model, help="Draft model to check it with.", show_default=False)
    ] = None,
    slots: Annotated[
        int, typer.Option("--slots", min=1, help="Sequences decoded at the same time, for the memory estimate.")
    ] = 1,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure",
            help="Tell expected tokens a second: loads a part of the weights, takes some seconds.",
        ),
    ] = True,
    vllm: Annotated[
        str | None,
        typer.Option("--vllm", metavar="URL", help="Instead: which of Outrider's parts are live in this vLLM server."),
    ] = None,
    json: Json = False,
) -> None:
    """Check a pair of checkpoints as loading does, without reading weights: architecture, tensors, tokenizer, memory.

    For one path it says whether it runs, through which runtime, how large it is, and how fast it will decode here by a measurement
    with a part of it (about two seconds for a model, --no-measure leaves that out). With --vllm http://127.0.0.1:8000 it asks that
    running vLLM server instead (docs/vllm.md). Exit code 0 if everything fits (every part is live), 1 if a check fails (a part is
    off), 2 if a checkpoint cannot be run (nobody answers).

    Example: outrider doctor model.gguf --slots 8
    """
    if vllm is not None:
        if target or draft:
            raise ConfigError(
                "--vllm asks a server, and a pair of checkpoints is checked without one: give one of them"
            )
        raise typer.Exit(live_parts(vllm, json))
    from outrider.assets import shipped

    folders = {"target": target or str(shipped("target"))}
    if draft or target is None:
        folders["draft"] = draft or str(shipped("draft"))
    models = {role: examine(name, options.dtype, slots, options.max_length, role) for role, name in folders.items()}
    checks = compare(models, folders)
    ok = all(c["ok"] for c in checks)
    notices = slow_parts(models)
    told = expected(folders, options.dtype) if measure and ok else {}
    if json:
        terminal.print_json({"ok": ok, "models": models, "checks": checks, "speed": told, "notices": notices})
    else:
        print_report(models, checks, notices)
        print_speed(told)
    if not ok:
        raise typer.Exit(1)


def live_parts(url: str, json: bool) -> int:
    """Print which parts are live in a vLLM server; the exit code."""
    from outrider.integrations.vllm.doctor import examine as ask

    parts = ask(url)
    ok = all(row["live"] for row in parts)
    if json:
        terminal.print_json({"ok": ok, "parts": parts})
        return 0 if ok else 1
    console = terminal.console()
    for row in parts:
        mark = "[green]live[/green]" if row["live"] else "[bold red]off [/bold red]"
        console.print(f"{mark} {row['part']:<21} ", end="")
        console.print(row["found"], markup=False)
        if row["remedy"]:
            console.print(" " * 27 + row["remedy"], style="bold", markup=False)
    return 0 if ok else 1


def examine(name: str, dtype: str, slots: int, max_length: int | None, role: str = "target") -> dict[str, Any]:
    """What one checkpoint is, as target or draft: read from its files alone, no weights loaded."""
    from outrider.drafters.mtp import carried
    from outrider.models.folder import resolve_folder
    from outrider.models.load import inspect_checkpoint

    facts = inspect_checkpoint(name, dtype=dtype, role=role)
    folder = resolve_folder(name)
    head = carried(folder) if folder.is_dir() else None
    length = min(max_length or facts.max_length, facts.max_length)
    return {
        "name": Path(name).name if Path(name).exists() else name,
        "architecture": facts.architecture,
        "runtime": facts.runtime,
        "reason": facts.reason,
        "parameters": facts.parameters,
        "stored": facts.stored,
        "dtype": facts.dtype,
        "vocabulary": facts.vocab_size,
        "context": facts.max_length,
        "weights_bytes": facts.weights_bytes,
        "experts": facts.experts,
        "kv_bytes": facts.kv_bytes_per_token * length * slots,
        "mtp_heads": 0 if head is None else head.depth,
        "notices": list(facts.notices),
    }


def expected(folders: dict[str, str], dtype: str) -> dict[str, Any]:
    """Tokens a second, plain and with the draft, measured with a part of the weights; or `unknown`, why not."""
    from outrider.evaluate.planning.pace import ROWS, pace

    with terminal.loading("measuring") as told:
        found = pace(folders["target"], folders.get("draft"), dtype, told)
    if isinstance(found, str):
        return {"unknown": found}
    whole = found.times.whole
    unmeasured = {"draft_unknown": found.unmeasured} if found.unmeasured else {}
    return unmeasured | {
        "plain": found.tokens,
        "rows": {str(n): whole[n] / whole[1] for n in ROWS},
        "disturbed": found.times.disturbed,
        "experts": {str(n): t for n, t in found.touched.items()},
        "with_draft": [{"acceptance": a, "tokens": t, "length": n} for a, (t, n) in found.drafted.items()],
    }


def print_speed(speed: dict[str, Any]) -> None:
    """One line on what to expect, one on drafts."""
    if not speed:
        return
    say = lambda text: terminal.console().print(f"[bold]note[/bold] {'expected':<11} {text}")  # noqa: E731
    if "unknown" in speed:
        say(f"no speed is told: {speed['unknown']}")
        return
    rows = ", ".join(f"{n}: {v:.2f}" for n, v in speed["rows"].items() if n != "1")
    say(f"about {tables.rate(speed['plain'])} tokens/s plain; time of more rows over that of one: {rows}")
    if speed["disturbed"]:
        say(
            "others used the processor meanwhile: several rows took less time than one. Run it again when they are done"
        )
    if "draft_unknown" in speed:
        say(f"with this draft none is told: {speed['draft_unknown']}")
    if speed["experts"]:
        touched = ", ".join(f"{n}: {t:.1f}" for n, t in speed["experts"].items())
        say(f"experts of a layer that rows of random tokens touch, by rows: {touched}; those of a text touch fewer")
    if speed["with_draft"]:
        each = ", ".join(
            f"{d['acceptance']:g}: {tables.rate(d['tokens'])} ({d['length']})" for d in speed["with_draft"]
        )
        say(f"with this draft, tokens/s by acceptance (tokens drafted a step): {each}")


def slow_parts(models: dict[str, dict[str, Any]]) -> list[str]:
    """Why this pair will not run as fast as it could on this machine, each reason once."""
    import torch

    from outrider.notices import machine_notices

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [notice for m in models.values() for notice in m["notices"]]
    return list(dict.fromkeys([*found, *machine_notices(device, "draft" in models)]))


def compare(models: dict[str, dict[str, Any]], folders: dict[str, str]) -> list[dict[str, Any]]:
    """The checks, each with a sentence that says what was found."""
    from outrider.models.load import available_memory, load_tokenizer, stop_ids
    from outrider.vocabulary import first_difference

    need = sum(m["weights_bytes"] + m["kv_bytes"] for m in models.values()) + (300 << 20)
    have = available_memory()
    fits = have is None or need <= have
    told = "unknown" if have is None else f"{have / 2**30:.1f} GiB available"
    checks = [
        {
            "check": "memory",
            "ok": fits,
            "found": f"about {need / 2**30:.2f} GiB needed (weights, KV, 0.3 working), {told}",
        }
    ]
    tokenizers, said = {}, []
    for role, folder in folders.items():
        try:
            tokenizers[role] = load_tokenizer(folder)
            if role == "target":
                stop_ids(folder, tokenizers[role], models[role]["vocabulary"])
        except ConfigError as error:
            said.append(str(error))
    checks.append({"check": "tokenizer", "ok": not said, "found": "; ".join(said) or "it can be read"})
    if "draft" not in models or said:
        return checks
    target, draft = models["target"], models["draft"]
    found = first_difference(tokenizers["target"].get_vocab(), tokenizers["draft"].get_vocab())
    checks.append(
        {
            "check": "vocabulary",
            "ok": found is None,
            "found": f"same strings for all shared ids ({target['vocabulary']} and {draft['vocabulary']} entries)"
            if found is None
            else f"id {found[0]} is {found[1]!r} in the target and {found[2]!r} in the draft: this pair cannot be used",
        }
    )
    longer = draft["context"] >= target["context"]
    checks.append(
        {
            "check": "context",
            "ok": True,
            "found": f"target {target['context']}, draft {draft['context']}"
            + ("" if longer else ": beyond the draft's context nothing is proposed (correct, only slower)"),
        }
    )
    share = draft["parameters"] / target["parameters"]
    checks.append(
        {
            "check": "cost",
            "ok": share < 0.5,
            "found": f"the draft has {share:.1%} of the target's parameters"
            + ("" if share < 0.5 else ": too many to pay for itself"),
        }
    )
    return checks


def print_report(models: dict[str, dict[str, Any]], checks: list[dict[str, Any]], notices: list[str]) -> None:
    """Tables for people."""
    console = terminal.console()
    table = Table("", *models, title="checkpoints", title_justify="left")
    size = lambda n: f"{n / 2**20:.1f} MiB"  # noqa: E731
    rows = {
        "name": str,
        "architecture": str,
        "runtime": str,
        "parameters": lambda n: f"{n / 1e6:.1f}M",
        "stored": str,
        "dtype": str,
        "vocabulary": str,
        "context": str,
        "weights_bytes": size,
        "kv_bytes": size,
    }
    if any(m["experts"] for m in models.values()):
        rows["experts"] = lambda told: told or "none"
    if any(m["mtp_heads"] for m in models.values()):
        rows["mtp_heads"] = lambda n: f"{n} (--draft mtp)" if n else "none"
    for key, show in rows.items():
        table.add_row(key.replace("_bytes", "").replace("_", " "), *(show(m[key]) for m in models.values()))
    tables.show(table, console)
    for check in checks:
        mark = "[green]ok[/green]  " if check["ok"] else "[bold red]FAIL[/bold red]"
        console.print(f"{mark} {check['check']:<11} {check['found']}")
    for notice in notices:
        console.print(f"[bold]note[/bold] {'speed':<11} {notice}")
