"""The section "Longer" of docs/left_to_right.md: does the gain of an objective grow or shrink when the training goes on?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from left_to_right_report import NAMES, Results, gain, judged, seeds_of, span, sums, table, tau

from outrider.evaluate.statistics.ratios import Ratio, influence, margin

BOTH = (("greedy", "greedy"), ("temperature 1, sampled", "T = 1, sampled"))


def growth(short: Results, long: Results, arm: str, block: int, way: str) -> dict[str, Any]:
    """How the gain of `arm` over uniform weights changed from the short to the long training: (1 + gain) by (1 + gain), per cent.

    The intervals are those of `gain`: clustered by prompt with these seeds held fixed, and over seeds. 0 is no change.
    """
    seeds = sorted(
        set(seeds_of(short, block, "training", arm, "uniform")) & set(seeds_of(long, block, "training", arm, "uniform"))
    )
    each, value, parts = np.ones(len(seeds)), 1.0, 0.0
    for results, name, sign in ((long, arm, 1), (long, "uniform", -1), (short, arm, -1), (short, "uniform", 1)):
        emitted, rounds = sums(results, name, block, seeds, "training", way)
        each = each * (emitted.sum(1) / rounds.sum(1)) ** sign
        value *= float(emitted.sum() / rounds.sum()) ** sign
        parts = parts + sign * influence(emitted.sum(0), rounds.sum(0))
    wide = margin([np.asarray(parts)])
    return judged(Ratio(value, value * math.exp(-wide), value * math.exp(wide)), 100 * (each - 1))


def arms_of(short: Results, long: Results, block: int) -> list[str]:
    """Arms that are there in both trainings, uniform weights first; none without those."""
    there = [a for a in NAMES if all(seeds_of(r, block, "training", "uniform", a) for r in (short, long))]
    return there if len(there) > 1 else []


ASIDE = """`python recipes/left_to_right.py longer` trains two arms for {times} times as long, some 20 minutes of a core, and adds
a section here: does the gain grow or shrink? It was not run for this page.
"""
INTRODUCTION = """## Longer (blocks of {block})

The same runs with {times} times the steps: same rows, prompts and intervals, the learning rates of the shorter ones. *Change of the
gain* is (1 + gain) after the longer training by (1 + gain) after the shorter one: above zero the gain has grown.

"""


def section(short: Results, long: Results, block: int, times: int) -> str:
    """Two tables: both trainings side by side, and the change of every gain. times: how much longer the longer one is."""
    arms = arms_of(short, long, block)
    if not arms:
        return ASIDE.format(times=times)
    rows = [line(r, a, block) for a in arms for r in (short, long)]
    head = ["arm", "steps", "seeds"]
    for _, name in BOTH:
        head += [name, "gain over uniform, %"]
    changes = []
    for arm in arms[1:]:
        for way, name in BOTH:
            g = growth(short, long, arm, block, way)
            changes.append(
                [
                    NAMES[arm],
                    name,
                    span(g),
                    f"{g['seed_low']:+.1f} to {g['seed_high']:+.1f}",
                    "yes" if g["claim"] else "no",
                ]
            )
    return INTRODUCTION.format(block=block, times=times) + "\n".join((
        table([*head, "greedy gain by seed, %", "claim", "slot 1, greedy"], rows),
        table(["arm", "proposals", "change of the gain, % (95% over prompts)", "95% over seeds", "claim"], changes),
    ))  # fmt: skip


def line(results: Results, arm: str, block: int) -> list[str]:
    """One arm after one training."""
    seeds = seeds_of(results, block, "training", arm, "uniform")
    cells = [NAMES[arm], f"{results[arm, block, seeds[0], 'training']['steps']:,}", str(len(seeds))]
    for way, _ in BOTH:
        cells.append(f"{tau(results, arm, block, seeds, 'training', way):.3f}")
        cells.append("" if arm == "uniform" else span(gain(results, arm, "uniform", block, "training", way)))
    g = gain(results, arm, "uniform", block, "training", "greedy")
    cells.append("" if arm == "uniform" else ", ".join(f"{x:+.1f}" for x in g["seeds"]))
    cells.append("" if arm == "uniform" else ("yes" if g["claim"] else "no"))
    runs = [results[arm, block, s, "training"]["greedy"] for s in seeds]
    first = sum(r["accepted_at"][0] for r in runs) / max(1, sum(r["judged_at"][0] for r in runs))
    return [*cells, f"{first:.3f}"]


def verdict(short: Results, long: Results, block: int) -> str:
    """What the section allows to say, a sentence for each arm."""
    out = []
    for arm in arms_of(short, long, block)[1:]:
        steps = [next(r["steps"] for (a, *_), r in results.items() if a == arm) for results in (short, long)]
        before, after = (gain(r, arm, "uniform", block, "training", "greedy") for r in (short, long))
        g = growth(short, long, arm, block, "greedy")
        word = ("grows" if g["value"] > 0 else "shrinks") if g["claim"] else "neither grows nor shrinks for sure"
        out.append(
            f"- Blocks of {block}, {steps[1]:,} steps instead of {steps[0]:,}: {NAMES[arm]} gains {after['value']:+.1f}% over "
            f"uniform weights (greedy; over prompts {after['low']:+.1f} to {after['high']:+.1f}, over seeds "
            f"{after['seed_low']:+.1f} to {after['seed_high']:+.1f}), after {before['value']:+.1f}%: the gain {word}."
        )
    return "".join(f"{x}\n" for x in out)
