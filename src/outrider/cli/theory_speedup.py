"""`outrider theory speedup`: predicted speed of a pair of models on a machine, by draft length. Measures nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.table import Table

from outrider.cli import tables, terminal
from outrider.cli.options import Json
from outrider.cli.takes import takes
from outrider.errors import ConfigError

LONGEST = 16


@dataclass(frozen=True, slots=True)
class Figures:
    """A machine of the table, and figures of one's own in GB/s, TFLOP/s and GB, which replace those of the table."""

    hardware: Annotated[
        str,
        typer.Option(
            "--hardware",
            help="a100, h100, h200, l4, l40s, rtx-3060, rtx-3090, rtx-4060, rtx-4070, rtx-4090, rtx-5090, rx-7900-xtx, m1, m2, m4, "
            "m4-pro, m3-max, m4-max, m2-ultra, ryzen-ai-max, laptop-ddr4, laptop-ddr5 or zen5-2.",
        ),
    ] = "h100"
    bandwidth: Annotated[
        float | None,
        typer.Option("--bandwidth", help="Your own machine: GB/s that its memory is read with.", show_default=False),
    ] = None
    flops: Annotated[
        float | None,
        typer.Option("--flops", help="Your own machine: TFLOP/s of its products.", show_default=False),
    ] = None
    memory: Annotated[
        float | None, typer.Option("--memory", help="Your own machine: GB of memory.", show_default=False)
    ] = None

    @property
    def own(self) -> tuple[float | None, float | None, float | None]:
        return self.bandwidth, self.flops, self.memory


@dataclass(frozen=True, slots=True)
class Split:
    """How the models are divided; see `theory.roofline.Setting`. link: a name, "free", or None: the usual one of the machine."""

    devices: Annotated[int, typer.Option("--devices", min=1, help="Devices that the models are split over.")] = 1
    pipeline: Annotated[
        int,
        typer.Option("--pipeline", min=1, help="Stages that the devices are divided into; each is tensor-parallel."),
    ] = 1
    link: Annotated[
        str | None,
        typer.Option(
            "--link",
            help="Between devices: nvlink3, nvlink4, pcie4, pcie5, ib-hdr, ib-ndr, or free. Default: the hardware's NVLink, free "
            "where it has none.",
            show_default=False,
        ),
    ] = None
    between: Annotated[
        str | None, typer.Option("--between", help="From stage to stage. Default: as --link.", show_default=False)
    ] = None
    draft_devices: Annotated[
        int | None,
        typer.Option("--draft-devices", min=1, help="Devices of the draft. Default: a stage's.", show_default=False),
    ] = None
    efficiency: Annotated[
        float, typer.Option("--efficiency", min=0.01, max=1, help="Share of the rates that software reaches.")
    ] = 1.0


@takes(Figures, "figures")
@takes(Split, "split")
def speedup(
    target: Annotated[
        str, typer.Option("--target", "-t", help="Size of the target: 8b, 70b, ... or parameters.")
    ] = "8b",
    draft: Annotated[str, typer.Option("--draft", "-d", help="Size of the draft model.")] = "1b",
    *,
    figures: Figures,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences decoded at the same time.")] = 1,
    context: Annotated[int, typer.Option("--context", min=0, help="Tokens in the cache of each sequence.")] = 1024,
    acceptance: Annotated[
        float,
        typer.Option(
            "--acceptance", min=0, max=1, help="Probability that a draft token is accepted when those before it were."
        ),
    ] = 0.8,
    length: Annotated[str, typer.Option("--length", "-l", help="Draft length, or auto: the best of 0 to 16.")] = "auto",
    split: Split,
    draft_context: Annotated[
        int | None,
        typer.Option("--draft-context", min=0, help="Tokens the draft attends to. Default: all.", show_default=False),
    ] = None,
    weight_bytes: Annotated[float, typer.Option("--bytes", help="Bytes of a weight and of a key or value.")] = 2.0,
    overhead: Annotated[float, typer.Option("--overhead-ms", min=0, help="Milliseconds added to every forward.")] = 0.0,
    recurrent: Annotated[
        bool,
        typer.Option(
            "--recurrent",
            help="The target's state cannot be cut (Mamba's kind): accepted tokens are read again after a rejection.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Predict tokens per second, plain and speculative, from the bandwidth, arithmetic and memory of a machine.

    Example: outrider theory speedup --target 70b --draft 1b --devices 4

    A target with a recurrent state: outrider theory speedup --target 8b --draft 1b --recurrent

    A laptop whose memory you measured: outrider theory speedup --hardware laptop-ddr5 --bandwidth 70 --bytes 0.6

    Two machines: outrider theory speedup --target 405b --draft 8b --devices 16 --pipeline 2 --between ib-ndr --batch 8
    """
    document = speedup_document(
        target,
        draft,
        figures,
        acceptance,
        length,
        batch,
        context,
        split,
        draft_context,
        weight_bytes,
        overhead / 1000,
        recurrent,
    )
    terminal.print_json(document) if json else print_speedup(document)


def speedup_document(
    target: str,
    draft: str,
    machine: Figures,
    acceptance: float,
    length: str,
    batch: int,
    context: int,
    split: Split,
    draft_context: int | None,
    element: float,
    overhead: float,
    recurrent: bool,
) -> dict[str, Any]:
    """The prediction with everything it was made from."""
    from outrider.theory import hardware, links, roofline

    if length != "auto" and not (length.isdigit() and int(length) <= 64):
        raise ConfigError(f"--length is auto or a whole number from 0 to 64, got {length!r}")
    try:
        scaled = (None if x is None else x * unit for x, unit in zip(machine.own, (1e9, 1e12, 1e9), strict=True))
        where = hardware.own(hardware.hardware(machine.hardware), *scaled)
        big, small = hardware.model(target), hardware.model(draft)
        over = (
            links.usual(machine.hardware)
            if split.link is None
            else links.link(split.link)
            if split.link != "free"
            else None
        )
        across = links.link(split.between) if split.between else None
        setting = roofline.Setting(
            where, batch, context, split.devices, draft_context, element, overhead, split.pipeline, over, across,
            split.draft_devices, split.efficiency, recurrent,
        )  # fmt: skip
        lengths = tuple(range(LONGEST + 1)) if length == "auto" else (0, int(length))
        found = roofline.predict(big, small, setting, acceptance, lengths)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return {
        **asdict(found),
        "chosen": asdict(found.best if length == "auto" else found.rows[-1]),
        "acceptance": acceptance,
        "target": asdict(big),
        "draft": asdict(small),
        "hardware": asdict(where),
        "batch": batch,
        "context": context,
        "devices": split.devices,
        "pipeline": split.pipeline,
        "link": None if over is None else asdict(over),
        "between": None if across is None else asdict(across),
        "draft_devices": split.draft_devices or split.devices // split.pipeline,
        "efficiency": split.efficiency,
        "draft_context": draft_context,
        "bytes": element,
        "recurrent": recurrent,
    }


def print_speedup(d: dict[str, Any]) -> None:
    """The document for people."""
    out = terminal.console()
    machine = d["hardware"]
    many = f"{d['devices']} x " if d["devices"] > 1 else ""
    out.print(
        f"predicted, not measured: {d['target']['source']} with {d['draft']['source']} on {many}{machine['name']}, "
        f"batch {d['batch']}, context {d['context']}, acceptance {d['acceptance']:g}"
    )
    kind = "measured rates" if machine["measured"] else "peak rates"
    out.print(
        f"[dim]{kind}: {machine['bandwidth'] / 1e9:.0f} GB/s, {machine['compute'] / 1e12:.4g} TFLOP/s ({machine['source']})[/dim]"
    )
    if d["devices"] > 1:
        out.print(f"[dim]{split_text(d)}[/dim]", soft_wrap=True)
    if not d["fits"]:
        out.print(
            f"[bold red]does not fit[/bold red]: {d['memory'] / 1e9:.0f} GB of weights and cache need {d['devices_needed']} "
            f"devices of {machine['memory'] / 1e9:.0f} GB, and there {'is' if d['devices'] == 1 else 'are'} {d['devices']}; "
            "the speeds below are of a machine that could hold it"
        )
    tables.show(rows_table(d), out)
    chosen, plain = d["chosen"], d["plain"]
    if chosen["length"]:
        out.print(
            f"length {chosen['length']}: {tables.rate(chosen['tokens_per_second'])} tokens/s against "
            f"{tables.rate(plain['tokens_per_second'])} plain, speed-up {chosen['speedup']:.2f}"
        )
    else:
        out.print(f"do not speculate: plain decoding's {tables.rate(plain['tokens_per_second'])} tokens/s are the most")
    out.print(
        f"bottlenecks: plain {d['plain_bottleneck']}, drafting {d['draft_bottleneck']}, verification {d['verify_bottleneck']}"
    )


def split_text(d: dict[str, Any]) -> str:
    """What is assumed of several devices."""
    parts = [f"tensor parallel over {d['devices'] // d['pipeline']}, {d['pipeline']} stage{'s' * (d['pipeline'] > 1)}"]
    for place, one in (("between devices", d["link"]), ("between stages", d["between"])):
        if one is not None:
            parts.append(
                f"{place} {one['name']}, {one['bandwidth'] / 1e9:g} GB/s one way ({one['source']}), {1e6 * one['latency']:g} us a "
                "message (assumed)"
            )
    parts.append("two all-reduces a layer, not hidden" if d["link"] else "what devices send each other takes no time")
    parts.append(f"the draft on {d['draft_devices']}; {d['efficiency']:.0%} of the rates")
    return "; ".join(parts)


def rows_table(d: dict[str, Any]) -> Table:
    """Speed by draft length; the best is marked."""
    table = Table()
    again = ["read again"] if d["recurrent"] else []
    for name in ("length", "tokens/call", *again, "drafting ms", "verification ms", "tokens/s", "speed-up"):
        table.add_column(name, justify="right")
    for row in d["rows"]:
        table.add_row(
            ("best " if row["length"] == d["best"]["length"] else "") + str(row["length"]),
            f"{row['tokens_per_call']:.2f}",
            *([f"{row['read_again']:.2f}"] if again else []),
            f"{1000 * row['draft_seconds']:.2f}",
            f"{1000 * row['verify_seconds']:.2f}",
            tables.rate(row["tokens_per_second"]),
            f"{row['speedup']:.2f}",
            style="bold green" if row["length"] == d["best"]["length"] else "",
        )
    return table
