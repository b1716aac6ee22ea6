"""`outrider tree`: the draft tree with the most tokens per second here, from measured acceptance and measured times."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli import tables, terminal
from outrider.cli.engine_options import ENGINE, load_engine
from outrider.cli.options import ChatTemplate, Json, Traffic
from outrider.cli.sampling_options import SAMPLING
from outrider.cli.takes import takes
from outrider.errors import ConfigError
from outrider.evaluate.workloads import told
from outrider.options import WITHOUT_MODEL, EngineOptions


@takes(
    ENGINE,
    "options",
    leave_out=("length", "lengths", "rule", "allow_lossy", "slots"),
    length=2,
    rule="speculative_sampling",
    slots=1,
)
@takes(SAMPLING, "sampling", only=("temperature", "max_tokens"), max_tokens=64, ignore_eos=True)
def tree(
    options: EngineOptions,
    sampling: Any,
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=256, help="Most nodes of a tree.")] = 16,
    depth: Annotated[int, typer.Option("--depth", min=1, max=16, help="Most levels of a tree.")] = 4,
    width: Annotated[int, typer.Option("--width", min=1, max=32, help="Most children of a node.")] = 4,
    prompts: Traffic = None,
    chat_template: ChatTemplate = True,
    count: Annotated[int, typer.Option("--count", min=1, help="Prompts used, from the start of the set.")] = 16,
    json: Json = False,
) -> None:
    """Measure acceptance by rank and the time of a step by nodes, and print the best tree as a --draft (Chen et al. 2024).

    Example: outrider tree --nodes 8 --depth 3 --count 4 --max-tokens 32
    """
    from outrider.evaluate.workloads import load_rows, ready

    if options.draft.partition(":")[0] in (*WITHOUT_MODEL, "none") and not Path(options.draft).exists():
        raise ConfigError(
            f"a tree is drawn from a draft model's distributions, and {options.draft!r} has none: give a folder or a Hub name"
        )
    rows = load_rows(prompts, count)
    from outrider.build import companion
    from outrider.evaluate.planning import tree as tr

    engine = load_engine(options)
    loaded = () if engine.loaded is None else engine.loaded.models
    model = next((key.name for key in loaded), None) if options.draft == "auto" else options.draft
    if model is None:
        raise ConfigError("no draft model beside this target: name one with --draft")
    texts, data, *_ = ready(engine, prompts, rows, chat_template)
    engine = companion(engine, "none", length=0)
    with terminal.loading("measuring acceptance by rank"):
        ranks = tr.measure_ranks(engine, model, texts, sampling, width)
    with terminal.loading("measuring steps"):
        times = tr.measure_times(engine, model, texts[:4], sampling, ranks, most=nodes, depth=depth)
    found = tr.advise(ranks, times, depth)
    document = document_of(ranks, times, found, model) | {"data": data}
    terminal.print_json(document) if json else print_document(document)


def document_of(ranks: Any, times: Any, found: Any, model: str) -> dict[str, Any]:
    """All that was measured and what follows, as plain data."""
    from outrider.evaluate.planning.tree import written

    return {
        "acceptance_by_rank": list(ranks.acceptance),
        "standard_error": list(ranks.error),
        "node_sets": ranks.seen,
        "step_seconds": {str(n): times.verify[n] for n in times.measured},
        "level_seconds": times.level,
        "parent": None if found.tree is None else list(found.tree.parent),
        "tokens_per_step": found.tokens_per_step,
        "tokens_per_second": {"tree": found.rate, "chain": found.chain_rate, "plain": found.plain},
        "chain_length": found.chain,
        "draft": "none" if found.tree is None else f"{written(found.tree)}:{model}",
        "length": 0 if found.tree is None else found.tree.depth,
    }


def print_document(d: dict[str, Any]) -> None:
    """The answer first, then what it rests on."""
    out = terminal.console()
    rates, drawn = d["tokens_per_second"], d["parent"]
    if drawn is None:
        out.print(
            f"do not speculate with a tree: plain decoding gives {tables.rate(rates['plain'])} tokens/s, and no tree is faster"
        )
    else:
        out.print(f"--draft '{d['draft']}' --length {d['length']} --rule speculative_sampling", soft_wrap=True)
        fast = {name: tables.rate(value) for name, value in rates.items()}
        out.print(
            f"{len(drawn)} nodes, {d['tokens_per_step']:.2f} tokens per step: {fast['tree']} tokens/s expected; best chain "
            f"(length {d['chain_length']}) {fast['chain']}, plain {fast['plain']}"
        )
        for line in draw_tree(drawn):
            out.print("  " + line)
    out.print(f"prompts: {told(d['data'])}")
    by_rank = ", ".join(f"{a:.3f} ± {e:.3f}" for a, e in zip(d["acceptance_by_rank"], d["standard_error"], strict=True))
    out.print(f"acceptance by rank (± a standard error; {d['node_sets']} node sets): {by_rank}")
    steps = ", ".join(f"{n}: {1e3 * s:.2f}" for n, s in d["step_seconds"].items())
    out.print(f"milliseconds of a step by nodes: {steps}; of a level of drafting {1e3 * d['level_seconds']:.2f}")


def draw_tree(parent: list[int]) -> list[str]:
    """The tree as text, one node a line, children indented below their parent."""
    children: dict[int, list[int]] = {}
    for node, up in enumerate(parent):
        children.setdefault(up, []).append(node)
    lines = ["anchor"]

    def walk(node: int, indent: str) -> None:
        for rank, child in enumerate(children.get(node, [])):
            last = rank + 1 == len(children[node])
            lines.append(f"{indent}{'└─' if last else '├─'} {rank + 1}")
            walk(child, indent + ("   " if last else "│  "))

    walk(-1, "")
    return lines
