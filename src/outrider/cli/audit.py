"""`outrider audit`: is a generator's text distributed as the target's?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from outrider.cli import options as opt
from outrider.cli import paths
from outrider.errors import ConfigError


def audit(
    target: opt.Target = None,
    draft: opt.Draft = "auto",
    length: opt.Length = 3,
    rule: opt.Rule = "auto",
    allow_lossy: opt.AllowLossy = False,
    url: Annotated[
        str | None,
        typer.Option("--url", help="Audit the OpenAI-compatible server at this address.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Name of the model at --url. Default: --target.", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="OUTRIDER_API_KEY", help="Key for --url.", show_default=False)
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(
            "--python",
            help="Audit module:function, called with (prompt token ids, seed); returns the new token ids.",
            show_default=False,
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            "--texts",
            callback=paths.file,
            help="Audit recorded texts: JSON lines of prompt_token_ids and token_ids.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", callback=paths.file, help="JSONL or text file of prompts.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Prompts used, from the start of the set.")] = 32,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Continuations of each prompt.")] = 2,
    max_tokens: opt.MaxTokens = 64,
    temperature: opt.Temperature = 1.0,
    top_k: opt.TopK = 0,
    top_p: opt.TopP = 1.0,
    min_p: opt.MinP = 0.0,
    repetition_penalty: opt.RepetitionPenalty = 1.0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Texts go on behind the end-of-text token.")] = False,
    level: Annotated[
        float, typer.Option("--level", help="Probability that an honest generator is ever accused.")
    ] = 0.01,
    tolerance: Annotated[
        str,
        typer.Option("--tolerance", help="Total variation per token that numerics may cause, or auto: measured here."),
    ] = "auto",
    detect: Annotated[
        float, typer.Option("--detect", help="Bias per token that must be detectable for a pass; else inconclusive.")
    ] = 0.1,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    implementation: opt.Implementation = "auto",
    max_length: opt.MaxLength = None,
    json: opt.Json = False,
) -> None:
    """Audit our engine, a server (--url) or a Python function (--python) against the target's own distribution.

    Exit code 0: exact so far, to the stated resolution. 1: not the target's distribution. 3: inconclusive.
    """
    from outrider.cli.setup import engine_from_options
    from outrider.evaluate.audit import sources as src
    from outrider.evaluate.workloads import load_prompts
    from outrider.params import SamplingParams

    if sum(x is not None for x in (url, python, texts)) > 1:
        raise ConfigError("--url, --python and --texts each name a generator: use one")
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
    )
    written = [] if texts else load_prompts(prompts, count)
    engine = engine_from_options(
        target=target,
        draft=draft,
        length=length,
        rule=rule,
        allow_lossy=allow_lossy,
        dtype=dtype,
        device=device,
        implementation=implementation,
        max_length=max_length,
        slots=1 if url or python or texts else 8,
    )
    if texts:
        recorded = src.read_texts(texts)
        asked, samples, source = recorded.prompts, recorded.samples, recorded.source()
    else:
        asked = engine.encode_all(written)
    if texts:
        pass
    elif url:
        name = model or target
        if name is None:
            raise ConfigError("--url needs the model's name there: add --model")
        source = src.of_endpoint(src.Endpoint(url, name, api_key), params, engine.parts.target.vocab_size)
    elif python:
        source = src.of_callable(src.load_callable(python))
    else:
        source = src.of_engine(engine, params)
    ours = not (url or python or texts)
    if temperature == 0:
        document, code = greedy(engine, source, asked)
    else:
        document, code = sampled(engine, source, asked, params, samples, level, tolerance, detect, seed, ours)
    document["generator"] = (
        url or python or (str(texts) if texts else None) or f"{engine.parts.drafter.name} / {engine.parts.rule.name}"
    )
    opt.print_json(document) if json else print_document(document)
    raise typer.Exit(code)


def sampled(
    engine: Any,
    source: Any,
    texts: list[list[int]],
    params: Any,
    samples: int,
    level: float,
    tolerance: str,
    detect: float,
    seed: int,
    ours: bool,
) -> tuple[dict[str, Any], int]:
    """The audit of sampled text: the document and the exit code."""
    from outrider.evaluate.audit.audit import Auditor
    from outrider.evaluate.audit.audit import audit as run
    from outrider.evaluate.audit.findings import EXACT, NOT_THE_TARGET, AuditOptions, as_document
    from outrider.evaluate.audit.whitebox import joint_distribution, rounding
    from outrider.evaluate.measure import machine
    from outrider.telemetry.ledger import ledger, summary

    if tolerance == "auto":
        allowed = max(1e-6, 2 * rounding(engine.parts.target, texts[0][:64]))
    else:
        try:
            allowed = float(tolerance)
        except ValueError:
            raise ConfigError(f"--tolerance is a number or auto, got {tolerance!r}") from None
    models = list(engine.loaded.models.values())
    options = AuditOptions(params, level, allowed, detect, seed)
    auditor = Auditor(engine.parts.target, models[0][0] if models else None, options, tuple(engine.eos))
    engine.reset()
    with opt.loading(f"auditing {samples} continuations of {len(texts)} prompts") as progress:
        verdict = run(source, texts, auditor, samples=samples, progress=progress)
    document = {**as_document(verdict), "machine": machine()}
    bad = verdict.outcome == NOT_THE_TARGET
    if ours:
        joint = joint_distribution(engine.parts.rule)
        book = ledger(engine.counts, level)
        document["white_box"] = {**summary(engine.counts), "joint_law_p_value": joint.p_value}
        bad = bad or not book.agrees or joint.p_value < level * 1e-3
    return document, 1 if bad else 0 if verdict.outcome == EXACT else 3


def greedy(engine: Any, source: Any, texts: list[list[int]]) -> tuple[dict[str, Any], int]:
    """The audit of greedy text: the document and the exit code."""
    from dataclasses import asdict

    from outrider.evaluate.audit.greedy import audit_greedy

    with opt.loading(f"auditing greedy continuations of {len(texts)} prompts"):
        v = audit_greedy(source, texts, engine.parts.target)
    document = {**asdict(v), "outcome": v.outcome, "sentence": v.outcome, "ties": len(v.departures) - len(v.wrong)}
    return document, 1 if v.wrong else 0 if v.texts else 3


def print_document(d: dict[str, Any]) -> None:
    """The document for people."""
    console = opt.console()
    console.print(f"[bold]{d['generator']}: {d['sentence']}[/bold]")
    console.print(f"judged               {d['tokens']} tokens of {d['texts']} texts, {d['failed']} failed")
    if "departures" in d:
        for x in d["departures"]:
            kind = "tie" if x["gap"] <= 2 * x["delta"] else "WRONG"
            console.print(
                f"  prompt {x['prompt']}, token {x['position']}: margin {x['gap']:.4g}, rounding {x['delta']:.2g}: {kind}"
            )
        return
    alarm = "" if d["alarm_at"] is None else f", alarm after {d['alarm_at']} tokens"
    console.print(
        f"evidence             10^{d['log10_evidence']:.1f} against the target's distribution "
        f"(alarm at {1 / d['level']:.0f}){alarm}"
    )
    console.print(f"tolerance            {d['tolerance']:.2g} total variation per token")
    if d["bias"] is not None:
        console.print(
            f"bias                 about {d['bias']:.3f} per token; 10^{d['odds']:.1f} times likelier than the next cause"
        )
    console.print(
        f"controls             target's own text 10^{d['control_honest']:.1f}, planted bias of {d['detect']:g} "
        f"10^{d['control_planted']:.1f} (at their highest)"
    )
    if d["law_gap"] is not None:
        console.print(f"reported log-probs   differ from ours by {d['law_gap']:.2g} total variation per token")
    if "white_box" in d:
        book = d["white_box"]["ledger"]
        console.print(
            f"ledger               predicted {book['predicted']:.1f} rejections, observed {book['observed']}: "
            f"{'agree' if book['agrees'] else 'DISAGREE'}; "
            f"joint distribution of the rule p = {d['white_box']['joint_law_p_value']:.3g}"
        )
    table = Table(title="families of mistakes", title_justify="left")
    for column in ("mistake", "evidence", "detectable bias per token"):
        table.add_column(column)
    for family, value in list(d["families"].items()):
        mine = [x for x in d["detectable"] if x["family"] == family]
        seen = [x["tv"] for x in mine if x["tv"] is not None]
        table.add_row(family, f"10^{value:.1f}", f"{min(seen):.3f}" if seen else "")
    opt.show(table, console)
