"""The page and the figure of `left_to_right.py`, from the results it left on disk: numbers and verdicts are computed."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from outrider.evaluate.statistics.ratios import Ratio, paired_ratio

WAYS = ("greedy", "temperature 1, most likely", "temperature 1, sampled")
STACK = ("uniform", "decay", "focal", "chain")
NAMES = {
    "uniform": "uniform", "decay": "decay", "focal": "decay + focal", "chain": "decay + focal + chain", "dpace": "D-PACE",
}  # fmt: skip
SOURCE = {"decay": "+8.7", "focal": "+21.7", "chain": "+43.9"}
"""Gains over uniform in per cent of Whalen et al. 2026, table 3: Llama-3-8B, blocks of 16, text as authored."""
TEMPLATE = Path(__file__).with_suffix("").with_name("left_to_right.md.in")
Results = dict[tuple[str, int, int, str], dict[str, Any]]


def read(work: Path, stage: str = "runs") -> Results:
    """Every result of a stage by (arm, block, seed, part)."""
    found = [json.loads(p.read_text()) for p in sorted((work / stage).glob("*/result.json"))]
    return {(r["arm"], r["block"], r["seed"], r["part"]): r for r in found}


def seeds_of(results: Results, block: int, part: str, *arms: str) -> list[int]:
    """Seeds for which all of `arms` are there."""
    each = [{s for a, b, s, p in results if (a, b, p) == (arm, block, part)} for arm in arms]
    return sorted(set.intersection(*each)) if each else []


def sums(
    results: Results, arm: str, block: int, seeds: list[int], part: str, way: str
) -> tuple[np.ndarray, np.ndarray]:
    """Emitted tokens and rounds, [seeds, prompts]."""
    runs = [results[arm, block, s, part][way] for s in seeds]
    return np.array([r["emitted"] for r in runs], float), np.array([r["rounds"] for r in runs], float)


def tau(results: Results, arm: str, block: int, seeds: list[int], part: str, way: str) -> float:
    """Tokens per round over all seeds and prompts, a ratio of sums."""
    emitted, rounds = sums(results, arm, block, seeds, part, way)
    return float(emitted.sum() / rounds.sum())


def gain(
    results: Results, arm: str, base: str, block: int, part: str, way: str, base_part: str | None = None
) -> dict[str, Any]:
    """Relative gain in tokens per round of `arm` over `base`, in per cent; its keys are those of `judged`."""
    other = base_part or part
    both = sorted(set(seeds_of(results, block, part, arm)) & set(seeds_of(results, block, other, base)))
    (e, n), (be, bn) = sums(results, arm, block, both, part, way), sums(results, base, block, both, other, way)
    each = 100 * ((e.sum(1) / n.sum(1)) / (be.sum(1) / bn.sum(1)) - 1)
    return judged(paired_ratio(e.sum(0), n.sum(0), be.sum(0), bn.sum(0)), each)


def judged(pooled: Ratio, each: np.ndarray) -> dict[str, Any]:
    """What is said of a ratio over all seeds and of its values by seed (`each`, per cent), which are paired.

    low, high: 95% interval clustered by prompt, these seeds held fixed. seeds: the values by seed; seed_low, seed_high: 95%
    interval (Student) of their mean. claim: whether both exclude zero on the same side.
    """
    wide = math.nan
    if len(each) > 1:
        wide = float(student.ppf(0.975, len(each) - 1) * each.std(ddof=1) / math.sqrt(len(each)))
    low, high = 100 * (pooled.low - 1), 100 * (pooled.high - 1)
    middle = float(each.mean())
    claim = low * high > 0 and (middle - wide) * (middle + wide) > 0
    return {
        "value": 100 * (pooled.value - 1), "low": low, "high": high, "seeds": [round(float(x), 2) for x in each],
        "seed_low": middle - wide, "seed_high": middle + wide, "claim": bool(claim),
    }  # fmt: skip


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows]) + "\n"


def span(g: dict[str, Any]) -> str:
    return f"{g['value']:+.1f} ({g['low']:+.1f} to {g['high']:+.1f})"


def main_table(results: Results, block: int) -> str:
    """Arms of one block size."""
    rows = []
    for arm in NAMES:
        seeds = seeds_of(results, block, "training", arm)
        if not seeds:
            continue
        cells = [NAMES[arm], str(len(seeds))]
        for way in WAYS:
            cells.append(f"{tau(results, arm, block, seeds, 'training', way):.3f}")
            cells.append("" if arm == "uniform" else span(gain(results, arm, "uniform", block, "training", way)))
        g = gain(results, arm, "uniform", block, "training", "greedy")
        cells.append("" if arm == "uniform" else ", ".join(f"{x:+.1f}" for x in g["seeds"]))
        cells.append("" if arm == "uniform" else ("yes" if g["claim"] else "no"))
        rows.append(cells)
    head = ["arm", "seeds"]
    for way in ("greedy", "T = 1, most likely", "T = 1, sampled"):
        head += [way, "gain over uniform, %"]
    return table([*head, "greedy gain by seed, %", "claim"], rows)


def steps_table(results: Results, block: int) -> str:
    """What each further term adds, greedy."""
    rows = []
    pairs = [*pairwise(STACK), ("decay", "chain"), ("decay", "dpace")]
    for base, arm in pairs:
        if not seeds_of(results, block, "training", base, arm):
            continue
        g = gain(results, arm, base, block, "training", "greedy")
        rows.append(
            [
                f"{NAMES[base]} -> {NAMES[arm]}",
                span(g),
                f"{g['seed_low']:+.1f} to {g['seed_high']:+.1f}",
                "yes" if g["claim"] else "no",
            ]
        )
    return table(["step", "gain, % (95% over prompts)", "95% over seeds", "claim"], rows)


def data_table(results: Results, block: int) -> str:
    """Text as it was written against text the target wrote, and what the full stack gains on either."""
    rows = []
    for arm in ("uniform", "chain"):
        if not seeds_of(results, block, "as_written", arm):
            return "Not run.\n"
        seeds = seeds_of(results, block, "as_written", arm)
        g = gain(results, arm, arm, block, "training", "greedy", base_part="as_written")
        rows.append(
            [
                NAMES[arm],
                *(f"{tau(results, arm, block, seeds, part, 'greedy'):.3f}" for part in ("as_written", "training")),
                span(g),
            ]
        )
    for part, name in (("as_written", "as it was written"), ("training", "the target's own")):
        g = gain(results, "chain", "uniform", block, part, "greedy")
        rows.append([f"full stack over uniform, {name}", "", "", span(g)])
    return table(["arm", "text as it was written", "text of the target", "gain, %"], rows)


def slots_table(results: Results, block: int) -> str:
    """Conditional acceptance by depth, greedy, all seeds."""
    rows = []
    for arm in NAMES:
        seeds = seeds_of(results, block, "training", arm)
        if not seeds:
            continue
        runs = [results[arm, block, s, "training"]["greedy"] for s in seeds]
        judged = np.array([r["judged_at"] for r in runs]).sum(0)
        accepted = np.array([r["accepted_at"] for r in runs]).sum(0)
        rows.append([NAMES[arm], *(f"{a / j:.3f}" if j else "" for a, j in zip(accepted, judged, strict=True))])
    return table(["arm", *(f"slot {d + 1}" for d in range(block - 1))], rows)


def verdicts(results: Results, blocks: list[int]) -> str:
    """What the tables allow to say, sentence by sentence."""
    out = []
    for block in blocks:
        for arm in ("chain", "dpace"):
            if not seeds_of(results, block, "training", "uniform", arm):
                continue
            g = gain(results, arm, "uniform", block, "training", "greedy")
            word = "more" if g["value"] > 0 else "fewer"
            sure = (
                "and both intervals exclude zero" if g["claim"] else "but that is no claim: an interval contains zero"
            )
            out.append(
                f"- Blocks of {block}: {NAMES[arm]} accepts {abs(g['value']):.1f}% {word} tokens per round than uniform weights "
                f"(greedy; 95% over prompts {g['low']:+.1f} to {g['high']:+.1f}, over seeds {g['seed_low']:+.1f} to "
                f"{g['seed_high']:+.1f}), {sure}."
            )
        if seeds_of(results, block, "training", "uniform", "decay", "chain"):
            part, whole = (
                gain(results, a, "uniform", block, "training", "greedy")["value"] for a in ("decay", "chain")
            )
            out.append(
                f"- Blocks of {block}: of the full stack's {whole:+.1f}%, positional decay alone gives {part:+.1f}%."
            )
    block = max(blocks)
    if seeds_of(results, block, "as_written", "uniform", "chain"):
        on, off = (gain(results, "chain", "uniform", block, p, "greedy")["value"] for p in ("training", "as_written"))
        text = gain(results, "uniform", "uniform", block, "training", "greedy", base_part="as_written")["value"]
        out.append(
            f"- Blocks of {block}: with uniform weights, text that the target wrote gives {text:+.1f}%; the full stack gains "
            f"{off:+.1f}% on text as it was written and {on:+.1f}% on the target's own."
        )
    return "\n".join(out) + "\n"


def page(results: Results, about: dict[str, Any]) -> str:
    """The whole page: the template with its places filled."""
    blocks = sorted({b for _, b, _, p in results if p == "training"})
    first = next(iter(results.values()))
    tables = (main_table, steps_table, slots_table)
    fill = {
        **{k: str(v) for k, v in about.items() if isinstance(v, int | float | str)},
        **{k: f"{v:,}" for k, v in about["target"].items()},
        "verdicts": verdicts(results, blocks),
        "source": ", ".join(f"{NAMES[a]} {SOURCE[a]}%" for a in SOURCE),
        "blocks": "\n".join("\n".join((f"## Blocks of {b}\n", *(t(results, b) for t in tables))) for b in blocks),
        "largest": str(max(blocks)),
        "data": data_table(results, max(blocks)),
        "parameters": f"{first['parameters']:,}",
        **{part: f"{tokens:.0f}" for part, tokens in about["spans"].items()},
        "tuned": ", ".join(f"{r['arm']} at {r['rate']:g} {r['tau']:.3f}" for r in about["tune"]),
        "rates": ", ".join(f"{NAMES[a]} {r:g}" for a, r in about["rates"].items()),
        "check": "; ".join(map(checked, about["check"])) or "not run",
        "cost": ", ".join(f"{k} {v / 60:.1f}" for k, v in about["seconds"].items()),
    }
    text = TEMPLATE.read_text()
    for name, value in fill.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def checked(c: dict[str, Any]) -> str:
    """One line of the check: tokens and rounds of both."""
    (rounds, tokens), (walk_rounds, walk_tokens) = c["engine"], c["walk"]
    return f"{NAMES[c['arm']]}, blocks of {c['block']}: {tokens}/{rounds} and {walk_tokens}/{walk_rounds}"


def draw(results: Results, path: Path) -> None:
    """Tokens per round by arm, a panel for each block size; dots are seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blocks = sorted({b for _, b, _, p in results if p == "training"})
    figure, axes = pyplot.subplots(1, len(blocks), figsize=(5.2 * len(blocks), 3.8), squeeze=False)
    colours = ("#2b6cb0", "#c05621", "#718096")
    for axis, block in zip(axes[0], blocks, strict=True):
        arms = [a for a in NAMES if seeds_of(results, block, "training", a)]
        for w, way in enumerate(WAYS):
            for n, arm in enumerate(arms):
                seeds = seeds_of(results, block, "training", arm)
                each = [tau(results, arm, block, [s], "training", way) for s in seeds]
                x = n + 0.26 * (w - 1)
                axis.bar(
                    x,
                    tau(results, arm, block, seeds, "training", way),
                    0.24,
                    color=colours[w],
                    alpha=0.75,
                    label=way if n == 0 else None,
                )
                axis.plot([x] * len(each), each, "k.", markersize=3)
        axis.set_xticks(range(len(arms)), [NAMES[a].replace(" + ", "\n+ ") for a in arms], fontsize=8)
        axis.set_ylim(bottom=1.0)
        axis.set_title(f"blocks of {block}")
        axis.set_ylabel("tokens per round")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(WAYS), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def write(work: Path, docs: Path, about: dict[str, Any]) -> None:
    """`left_to_right.md` and its figure in `docs`."""
    results = read(work)
    if not results:
        raise SystemExit("there are no results yet: run the stage 'runs' first")
    draw(results, docs / "figures" / "left_to_right.png")
    (docs / "left_to_right.md").write_text(page(results, about))
    print(f"written: {docs / 'left_to_right.md'}")
