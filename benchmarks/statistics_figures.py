"""The pictures of the pages on evaluation and on the audit: what looking early does, and evidence as it grows.

    python benchmarks/statistics_figures.py docs/figures      # needs matplotlib, about two minutes

Everything is simulated or run on toy tables with fixed seeds: the figures are the same on every machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from scipy.stats import t

sys.path.insert(0, str(Path(__file__).parents[1]))  # the planted mistakes live with the tests

from outrider.evaluate.audit.audit import Auditor, audit
from outrider.evaluate.audit.findings import AuditOptions
from outrider.evaluate.audit.sources import of_engine
from outrider.evaluate.statistics.sequential import half_width_factor
from outrider.verify import load_rule
from tests.evaluate import liars as lie

mpl.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#777777"
LEVEL, LOOKS, RUNS, G = 0.05, 300, 4000, 0.1
BROKEN = {
    "keeps refused drafts in one of five cases": ORANGE,
    "correction from p": GREEN,
    "temperature 1.25": "#cc79a7",
    "top-k 5 though not asked": "#e69f00",
}


def bands(draw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[runs, looks] running mean, half width of the t-interval, half width of the confidence sequence."""
    n = np.arange(1, draw.shape[1] + 1)
    mean = draw.cumsum(1) / n
    sd = np.sqrt(np.maximum((draw**2).cumsum(1) / n - mean**2, 0) * n / np.maximum(n - 1, 1))
    factor = np.array([half_width_factor(int(k), LEVEL, G) for k in n])
    usual = t.isf(LEVEL / 2, np.maximum(n - 1, 1)) * sd / np.sqrt(n)
    with np.errstate(invalid="ignore"):
        always = factor * sd / np.sqrt(n)
    usual[:, :4] = always[:, ~np.isfinite(factor)] = np.inf
    return mean, usual, always


def looking(folder: Path) -> None:
    """Two panels: one experiment without an effect, and how often experiments without one have raised an alarm so far."""
    draw = np.random.default_rng(3).normal(0, 0.1, size=(RUNS, LOOKS))
    mean, usual, always = bands(draw)
    early, never = np.abs(mean) > usual, ~(np.abs(mean) > always).any(1)
    wrong = never & early[:, 80:160].any(1) & ~early[:, :80].any(1)
    one, n = int(np.nonzero(wrong)[0][0]), np.arange(1, LOOKS + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.axhline(0, color=GREY, linewidth=1, linestyle="--")
    for width, colour, name in ((always, BLUE, "confidence sequence"), (usual, ORANGE, "ordinary 95% interval")):
        left.fill_between(
            n, (mean - width)[one], (mean + width)[one], color=colour, alpha=0.25, label=name, linewidth=0
        )
    left.plot(n, mean[one], color="black", linewidth=1.2, label="mean so far")
    out = np.nonzero(np.abs(mean[one]) > usual[one])[0][0]
    left.plot(n[out], mean[one, out], "o", color=ORANGE)
    left.annotate(
        "ordinary interval: “a difference”", (n[out], mean[one, out]), (110, 0.09), arrowprops={"arrowstyle": "->"}
    )
    left.set(
        ylim=(-0.12, 0.12),
        xlabel="prompts seen",
        ylabel="log ratio of speeds",
        title="One experiment; the arms are equal",
    )
    left.legend(loc="lower right", fontsize=8)
    for width, colour, name in ((usual, ORANGE, "ordinary 95% interval"), (always, BLUE, "confidence sequence")):
        alarms = np.maximum.accumulate(np.abs(mean) > width, axis=1).mean(0)
        right.plot(n, 100 * alarms, color=colour, linewidth=2, label=name)
    right.axhline(100 * LEVEL, color=GREY, linewidth=1, linestyle="--")
    right.text(LOOKS, 100 * LEVEL + 1, "5%", ha="right", color=GREY)
    right.set(
        xlabel="looks so far",
        ylabel="experiments with a false alarm (%)",
        title=f"{RUNS} experiments; the arms are equal",
    )
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    save(figure, folder, "looking_early")


def evidence(folder: Path) -> None:
    """Evidence by tokens: thirty honest runs, and four engines with a planted mistake."""
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    honest = of_engine(lie.engine(load_rule("speculative_sampling")), lie.PLAIN)
    for seed in range(30):
        path = run(honest, seed, 1500)
        axes.plot(path, color=BLUE, alpha=0.35, linewidth=0.8, label="30 honest runs" if seed == 0 else None)
    for liar in lie.LIARS:
        if liar.name in BROKEN:
            path = run(liar.source(liar.params), 0, 1500)
            axes.plot(path, color=BROKEN[liar.name], linewidth=2, label=liar.name)
            alarm = int(np.argmax(path >= 2))
            axes.plot(alarm, 2, "o", color=BROKEN[liar.name])
    axes.axhline(2, color=GREY, linewidth=1, linestyle="--")
    axes.text(1500, 2.2, "alarm: 100 to 1", ha="right", color=GREY)
    axes.set(
        xlim=(0, 1500), ylim=(-1.5, 14), xlabel="tokens", ylabel="evidence against the target's law (powers of ten)"
    )
    axes.legend(fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.4))
    save(figure, folder, "audit_evidence")


def run(source, seed: int, budget: int) -> np.ndarray:
    """log10 of the evidence after every token."""
    auditor = Auditor(lie.TARGET, lie.DRAFT, AuditOptions(lie.PLAIN, seed=seed))
    audit(source, lie.PROMPTS, auditor, samples=2, budget=budget)
    return np.array(auditor.process.path[:budget]) / np.log(10)


def save(figure, folder: Path, name: str) -> None:
    """As SVG for the page and PNG for readers that show none."""
    for suffix in ("svg", "png"):
        figure.savefig(folder / f"{name}.{suffix}", dpi=110, metadata={"Date": None} if suffix == "svg" else None)
    plt.close(figure)


if __name__ == "__main__":
    mpl.rcParams.update({"svg.hashsalt": "outrider", "axes.spines.top": False, "axes.spines.right": False})
    where = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/figures")
    looking(where)
    evidence(where)
