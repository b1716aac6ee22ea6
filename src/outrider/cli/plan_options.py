"""The options of `outrider plan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from outrider.cli import paths
from outrider.cli.options import ChatTemplate, Traffic, given_of, refuse_beside, spelled
from outrider.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What is compared, on how much, and whether the plan is held to a measurement. As on the command line."""

    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="Target model: a folder or a Hub name; with --gpus a size. Default: the shipped pair.",
            show_default=False,
        ),
    ] = None
    draft: Annotated[
        list[str] | None,
        typer.Option(
            "--draft", "-d", help="Drafter to consider (repeatable); with --gpus a size. Default: auto, or 1b."
        ),
    ] = None
    lengths: Annotated[
        str,
        typer.Option("--lengths", help="Draft lengths to consider; 0, plain decoding, is always among them."),
    ] = "0,1,2,3,4,6"
    batches: Annotated[str, typer.Option("--batches", help="Numbers of prompts decoded at the same time, as 1,4.")] = (
        "1"
    )
    prompts: Traffic = None
    chat_template: ChatTemplate = True
    count: Annotated[int, typer.Option("--count", min=4, help="Prompts used to predict acceptance.")] = 24
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Timed runs of each configuration.")] = 4
    price: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour", "--price", min=0, help="Price of this machine per hour: adds cost.", show_default=False
        ),
    ] = None
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Also measure every configuration on all prompts, between the other runs, and compare with the plan.",
        ),
    ] = False
    within: Annotated[
        float, typer.Option("--within", min=0.01, max=1, help="Error that --check allows, as a share.")
    ] = 0.1
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            callback=paths.out_file,
            help="Write the document (.json) or the table (.md) to this file.",
            show_default=False,
        ),
    ] = None
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampled texts and of the order of the runs.")] = 0
    slots: Annotated[
        int, typer.Option("--slots", min=1, max=1024, help="With --traffic: sequences that a replica decodes together.")
    ] = 8
    traffic: Annotated[
        str | None,
        typer.Option(
            "--traffic",
            help="Simulate a fleet under this traffic: poisson:RATE (requests a second, lengths from --prompts and "
            "--max-tokens), or a JSONL trace (arrival, prompt_tokens, output_tokens; or Mooncake's columns).",
            show_default=False,
        ),
    ] = None
    requests: Annotated[
        int, typer.Option("--requests", min=1, max=1_000_000, help="With --traffic: requests to simulate.")
    ] = 10_000
    replicas: Annotated[
        int | None,
        typer.Option(
            "--replicas",
            min=1,
            max=1000,
            help="With --traffic: this many replicas; with --ray: at most so many.",
            show_default=False,
        ),
    ] = None
    ttft: Annotated[
        float | None,
        typer.Option("--ttft", min=0, help="Target: seconds to the first token.", show_default=False),
    ] = None
    itl: Annotated[
        float | None,
        typer.Option(
            "--itl", min=0, help="Target: seconds per token after the first, of a request.", show_default=False
        ),
    ] = None
    percentile: Annotated[
        float,
        typer.Option(
            "--percentile", min=1, max=99.99, help="Share of requests that must meet the target, in per cent."
        ),
    ] = 95.0
    overhead: Annotated[
        float,
        typer.Option("--overhead-ms", min=0, help="With --traffic: milliseconds of network and HTTP per request."),
    ] = 0.0
    step: Annotated[
        float,
        typer.Option(
            "--step-ms", min=0, help="With --traffic: milliseconds that serving adds to a step: text and HTTP."
        ),
    ] = 0.0
    mtbf: Annotated[
        float | None,
        typer.Option(
            "--mtbf", min=0.001, help="With --traffic: hours between failures of a replica.", show_default=False
        ),
    ] = None
    repair: Annotated[
        float, typer.Option("--repair", min=0, help="With --mtbf: seconds until a failed replica is back.")
    ] = 60.0
    retries: Annotated[
        int,
        typer.Option("--retries", min=0, max=100, help="With --mtbf: times that a client sends a lost request again."),
    ] = 0
    vllm: Annotated[
        str | None,
        typer.Option(
            "--vllm", help="Also print the command for this release of vLLM: 0.32 or 0.33.", show_default=False
        ),
    ] = None
    ray: Annotated[
        bool,
        typer.Option("--ray", help="Also print a Ray Serve file (ray 2.60) that starts it; --out FILE.yaml writes it."),
    ] = False
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            min=1,
            max=1024,
            help="Plan on paper, from data sheets: --target and --draft are then sizes (70b, 1b), split over this many GPUs.",
            show_default=False,
        ),
    ] = None
    hardware: Annotated[
        str,
        typer.Option("--hardware", help="With --gpus: a100, h100, h200, rtx-4090, m4-max, ... (see theory speedup)."),
    ] = "h100"
    link: Annotated[
        str | None,
        typer.Option(
            "--link", help="With --gpus: between GPUs of a machine. Default: the hardware's NVLink.", show_default=False
        ),
    ] = None
    between: Annotated[str, typer.Option("--between", help="With --gpus: between machines of 8: ib-hdr, ib-ndr.")] = (
        "ib-ndr"
    )
    acceptance: Annotated[
        str,
        typer.Option(
            "--acceptance",
            help="With --gpus or --contexts: probability that a draft token is accepted, 0 to 1; as 0.9,0.6 for each --draft.",
        ),
    ] = "0.8"
    context: Annotated[
        int, typer.Option("--context", min=0, help="With --gpus: tokens in the cache of a sequence.")
    ] = 2048
    contexts: Annotated[
        str | None,
        typer.Option(
            "--contexts",
            help="Cached tokens, as 2048,8192: time passes over so many, and say where drafting over a view of the target's own "
            "cache (--draft sparse:window:16+496) or with a draft model is faster than plain decoding.",
            show_default=False,
        ),
    ] = None
    efficiency: Annotated[
        float,
        typer.Option("--efficiency", min=0.01, max=1, help="With --gpus: share of peak rates that software reaches."),
    ] = 0.7
    disaggregated: Annotated[
        bool,
        typer.Option(
            "--disaggregated", help="With --gpus: prompts are read on other GPUs of the same kind and number."
        ),
    ] = False
    recurrent: Annotated[
        bool,
        typer.Option(
            "--recurrent",
            help="With --gpus: the target's state cannot be cut (Mamba's kind): accepted tokens are read again after a rejection.",
        ),
    ] = False


_WITHOUT: dict[str, tuple[str, ...]] = {
    "traffic": ("slots", "ttft", "itl", "percentile", "overhead", "step", "mtbf", "repair", "retries"),
    "gpus": ("hardware", "link", "between", "context", "efficiency", "disaggregated", "recurrent"),
    "mtbf": ("repair", "retries"),
    "check": ("within",),
}
"""An option, and those that say nothing without it. Numbers that only say how much is measured or drawn are taken everywhere."""
_BESIDE: dict[str, tuple[str, ...]] = {
    "gpus": ("traffic", "prompts", "chat_template", "check", "replicas", "vllm", "ray", "contexts"),
    "contexts": ("traffic", "prompts", "chat_template", "count", "check", "replicas", "vllm", "ray", "price", "seed"),
    "traffic": ("batches", "check", "vllm", "ray"),
}
"""An option, and those that say nothing beside it."""


def check_together(asked: PlanOptions) -> None:
    """Raises ConfigError, before anything is measured, for an option that would be ignored or a file that would not be written."""
    given = given_of(asked)
    for needed, options in _WITHOUT.items():
        for name in options:
            if name in given and needed not in given:
                raise ConfigError(f"{spelled(name)} says nothing without --{needed}: add it, or leave this out")
    for mode, options in _BESIDE.items():
        if mode in given:
            refuse_beside(mode, asked, options)
    if "acceptance" in given and not given & {"gpus", "contexts"}:
        raise ConfigError("--acceptance says nothing without --gpus or --contexts: acceptance is measured here")
    if asked.replicas is not None and asked.traffic is None and not asked.ray:
        raise ConfigError("--replicas is about a fleet: add --traffic poisson:RATE or a trace, or --ray")
    if asked.traffic is not None and len(asked.draft or ()) > 1:
        raise ConfigError("--traffic simulates one drafter: give --draft once")
    suffix = "" if asked.out is None else asked.out.suffix
    if suffix in (".yaml", ".yml") and not asked.ray:
        raise ConfigError(f"{asked.out}: a YAML file is what --ray writes; add --ray, or name a .json or .md file")
    if suffix == ".md" and given & {"gpus", "traffic", "contexts"}:
        raise ConfigError(f"{asked.out}: only a ranking is written as Markdown; name a .json file")
