"""`outrider plan --traffic`: the fleet that a traffic needs, simulated on step times and acceptance measured here."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from outrider.cli import tables, terminal
from outrider.evaluate.workloads import told


def fleet_document(
    engine: Any, draft: str, lengths: list[int], items: Any, sampling: Any, asked: Any
) -> dict[str, Any]:
    """Measure the step table, and simulate the fleet with and without drafts. asked: the `PlanOptions`."""
    from outrider.evaluate.planning import capacity, step_table
    from outrider.theory.fleet import Failures

    texts = [engine.encode(i.prompt) for i in items]
    traffic = capacity.read_traffic(
        asked.traffic, [len(t) for t in texts], [sampling.max_tokens] * len(texts), asked.requests, asked.seed
    )
    slots = asked.slots
    loads = sorted({1, *(b for b in (2, 4, 8, 16, 32, 64) if b < slots), slots})
    with terminal.loading(f"timing steps of {draft}: {len(lengths)} lengths at {len(loads)} loads") as progress:
        table = step_table.measure(
            engine, texts, draft, lengths, loads, sampling, rounds=asked.rounds, seed=asked.seed, progress=progress
        ).served(asked.step / 1000)
    chunk = engine.options.chunk
    arms = {
        "speculative": table.replica(slots, True, chunk, asked.overhead / 1000),
        "plain": table.replica(slots, False, chunk, asked.overhead / 1000),
    }
    failures = None if asked.mtbf is None else Failures(asked.mtbf * 3600, asked.repair, asked.retries)
    target = capacity.Target(asked.ttft, asked.itl, asked.percentile)
    found = capacity.plan_fleet(
        traffic, arms, target, replicas=asked.replicas, price=asked.price, failures=failures, seed=asked.seed,
        progress=terminal.say,
    )  # fmt: skip
    return {
        "traffic": asked.traffic,
        "requests": len(traffic.arrival),
        "rate": len(traffic.arrival) / max(1e-9, float(traffic.arrival[-1])),
        "prompt_tokens": float(traffic.prompt.mean()),
        "output_tokens": float(traffic.output.mean()),
        "draft": draft,
        "slots": slots,
        "chunk": chunk,
        "target": {"ttft": asked.ttft, "itl": asked.itl, "percentile": asked.percentile},
        "acceptance": list(table.acceptance(max(lengths))),
        "step_seconds": {
            str(n): {str(b): s for b, s in sorted(row.items())} for n, row in sorted(table.decode.items())
        },
        "prompt_seconds": {"drafting" if d else "plain": row for d, row in table.prompts.items()},
        "arms": found,
    }


def print_fleet(d: dict[str, Any]) -> None:
    """The document for people."""
    out = terminal.console()
    out.print(
        f"simulated, from step times and acceptance measured here: {d['requests']} requests, {d['rate']:.3g} a second, prompts of "
        f"{d['prompt_tokens']:.0f} and outputs of {d['output_tokens']:.0f} tokens on average, {d['slots']} slots a replica"
    )
    out.print(f"prompts: {told(d['data'])}")
    table = Table()
    priced = any(a.get(k) and a[k]["price_per_hour"] is not None for a in d["arms"].values() for k in ("at", "fewest"))
    for name in (
        "arm",
        "replicas",
        "tokens/s",
        "busy",
        "first token p50, p95 ms",
        "per token p50, p95 ms",
        "failed, refused",
    ):
        table.add_column(name, justify="right" if name != "arm" else "left", overflow="fold")
    if priced:
        table.add_column("per hour; per million tokens", justify="right")
    for name, arm in d["arms"].items():
        for kind in ("at", "fewest"):
            row = arm.get(kind)
            if row:
                cells = [
                    f"{name}, fewest" if kind == "fewest" else name,
                    str(row["replicas"]),
                    f"{row['tokens_per_second']:.1f}",
                ]
                cells += ["" if row["busy"] is None else f"{row['busy']:.0%}", _ms(row["ttft"]), _ms(row["itl"])]
                cells += [f"{row['failed']}, {row['refused']}"]
                table.add_row(
                    *cells, *([f"{row['price_per_hour']:.2f}; {row['price_per_million_tokens']:.2f}"] if priced else [])
                )
    tables.show(table, out)
    goal = d["target"]
    said = [f"{n} at most {1000 * v:g} ms" for n, v in (("first token", goal["ttft"]), ("per token", goal["itl"])) if v]
    for name, arm in d["arms"].items():
        if "fewest" in arm and said:
            what = " and ".join(said) + f" for {goal['percentile']:g}% of requests"
            number = (
                "no number of replicas up to 1000 gives"
                if arm["fewest"] is None
                else "1 replica gives"
                if arm["fewest"]["replicas"] == 1
                else f"{arm['fewest']['replicas']} replicas give"
            )
            out.print(f"[bold]{name}: {number} {what}[/bold]")
    out.print(
        f"draft length by load, 1 to {d['slots']} sequences: {d['arms']['speculative']['lengths'][1:]}", soft_wrap=True
    )


def _ms(p: dict[str, float | None]) -> str:
    return "none" if p["p50"] is None or p["p95"] is None else f"{1000 * p['p50']:.1f}, {1000 * p['p95']:.1f}"
