"""How far lossy rules move probability between image codes: total variation does not say whether a grey went to the next grey or to
black. Beside it stands the earth mover's distance of a place's output distribution from the target's, over distances of codes.

Places are those of plain pictures, so that every rule is asked about the same ones.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import image_data
import numpy as np
import torch

from outrider.evaluate.images import Drawing, load_painter
from outrider.evaluate.scoring.score import Clock, Emitted, score
from outrider.theory.earth_mover import earth_movers_distance
from outrider.verify import load_rule
from outrider.verify.lossy import Lossy, Position, allowed, bias_of

PLACES = 400
RULES = {
    "tv_budget": [f"tv_budget:per_token={x}" for x in (0.02, 0.05, 0.1, 0.2)],
    "neighbours": [f"neighbours:delta={x},k=16" for x in (0.05, 0.1, 0.2, 0.4)],
    "cluster": [f"cluster:near={x}" for x in (0.07, 0.13, 0.25, 0.5)],
}
"""Each rule at its own thresholds, from strict to loose; only `tv_budget` is bounded by a budget."""


@dataclass(frozen=True)
class Move:
    """A rule at a threshold, means over places. accepted: probability that a drafted token is accepted. variation: total variation.
    distance: earth mover's, in units of full contrast; spread: half of its 95% interval. reach: mean distance of moved mass."""

    rule: str
    spec: str
    accepted: float
    variation: float
    distance: float
    spread: float
    reach: float


def output_of(rule: Lossy, p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Output distribution [V] of a place, its total variation from p, and the probability that a drafted token is accepted."""
    here = Position(torch.from_numpy(p)[None], torch.from_numpy(q)[None], rule.per_token)
    plan = allowed(rule.accept(here), here)
    bias = bias_of(plan, here)
    share = min(1.0, rule.per_token / bias) if bias > 0 else 1.0
    moved = (plan.accept * here.q + plan.rest - here.p)[0].numpy()
    accepted = share * float((plan.accept * here.q).sum()) + (1 - share) * float(np.minimum(p, q).sum())
    return p + share * moved, share * bias, accepted


def places(
    folder: Path, images: image_data.Images, drawings: list[Drawing], names: list[str | None], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """p, q [count, C] of the target and the distilled draft, guided, at random places of plain pictures."""
    painter = load_painter(folder / "target", str(folder / "draft"), rule="block", dtype="float32")
    raster, params = images.raster, painter.request(None, 0)[1]
    texts = [
        Emitted(raster.prompt(name), list(d.tokens), False, raster.tokens, i)
        for i, (name, d) in enumerate(zip(names, drawings, strict=True))
    ]
    drafter: Any = painter.engine.parts.drafter
    draft = drafter.model  # guided, as it drafts
    found = score(painter.engine, draft, texts, [""] * len(texts), params, Clock(), lambda _: None, rows=count)
    codes = len(raster.colours)
    p, q = (rows[:, :codes] for rows in (found.target_rows, found.draft_rows))
    return p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)


def moves(p: np.ndarray, q: np.ndarray, points: np.ndarray) -> list[dict[str, Any]]:
    """Every rule at every threshold."""
    out = []
    for name, specs in RULES.items():
        for spec in specs:
            rule = load_rule(spec, torch.from_numpy(points))
            assert isinstance(rule, Lossy)
            rows = np.asarray([_place(rule, a, b, points) for a, b in zip(p, q, strict=True)])
            variation, distance, accepted = rows.mean(0)
            spread = 1.96 * rows[:, 1].std(ddof=1) / math.sqrt(len(rows))
            reach = distance / variation if variation else 0.0
            out.append(asdict(Move(name, spec, accepted, variation, distance, float(spread), reach)))
    return out


def _place(rule: Lossy, p: np.ndarray, q: np.ndarray, points: np.ndarray) -> tuple[float, float, float]:
    output, variation, accepted = output_of(rule, p, q)
    return variation, earth_movers_distance(output, p, points), accepted


def measure(folder: Path, images: image_data.Images, jobs: list[tuple[str | None, int]]) -> list[dict[str, Any]]:
    """`moves` at PLACES places of plain pictures. jobs: their classes and seeds."""
    drawings = load_painter(folder / "target", "none", length=0, slots=len(jobs), dtype="float32").draw(jobs)
    p, q = places(folder, images, drawings, [name for name, _ in jobs], PLACES)
    return moves(p, q, images.raster.codes())


def table(found: list[dict[str, Any]]) -> list[str]:
    """Lines of the page."""
    lines = [
        "| rule | drafted tokens accepted | total variation | earth mover's distance | a moved token goes |",
        "|---|---|---|---|---|",
    ]
    for f in found:
        moved = f"{f['distance']:.4f} (± {f['spread']:.4f})"
        lines.append(f"| `{f['spec']}` | {f['accepted']:.3f} | {f['variation']:.4f} | {moved} | {f['reach']:.3f} |")
    return lines


def figure(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Accepted share against total variation and against the earth mover's distance, a line a rule. found: kind -> moves."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "images", "svg.fonttype": "none", "font.size": 9})
    fig, panels = pyplot.subplots(1, 2 * len(found), figsize=(4.2 * 2 * len(found), 3.2), squeeze=False)
    axes = iter(panels[0])
    for kind, rows in found.items():
        for key, words in (("variation", "total variation"), ("distance", "earth mover's distance")):
            axis = next(axes)
            for name in RULES:
                mine = [r for r in rows if r["rule"] == name]
                axis.plot([r[key] for r in mine], [r["accepted"] for r in mine], "o-", markersize=3, label=name)
            axis.set_xlabel(f"{words} per token")
            axis.set_title(kind)
    panels[0][0].set_ylabel("drafted tokens accepted")
    panels[0][0].legend(fontsize=7, frameon=False)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, metadata={"Date": None})
