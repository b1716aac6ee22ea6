"""Figures 2 and 5 of Yin et al., NeurIPS 2024: rejections on a pair of Markov chains, over runs and over drafts."""

from __future__ import annotations

import math

import numpy as np

from outrider.theory import batch, rejections, simulate
from outrider.theory.chains import Chain
from outrider.theory.figures.figure import SEED, Curve, Figure, Panel, curve, points

SWEEP = (1, 2, 5, 10, 20, 50, 150, 200, 400, 1000, 2000)
PAPER_FIGURE_5 = (33.53, 30.96, 28.74, 27.60, 26.76, 26.0, 25.49, 25.41, 25.29, 25.18, 25.15)


def figure_2a(chain: Chain, runs: int) -> Figure:
    """Running mean of the rejections of plain speculative decoding over the number of runs."""
    estimate, curves = _running(chain, 1, runs, series=0)
    paper = curve("paper", "paper", [runs], [16.400], series=0)
    ratio = chain.horizon / (estimate.exact or math.nan)
    return Figure(
        "figure-2a",
        (Panel("Speculative decoding, T = 50", "runs", "mean number of rejections", (*curves, paper)),),
        f"Mean number of rejections over the first n runs of speculative decoding (line with band: mean and one standard "
        f"error, exact standard deviation / sqrt(n)) and its exact value (Theorem 1). 7 states, T = 50, {runs:,} runs. "
        f"Cross: the end of the paper's simulated curve, 16.400.",
        f"exact {estimate.exact:.4f}, simulated {estimate.mean:.3f} (z = {estimate.z:+.2f}); paper 16.41 and 16.400. "
        f"T / rejections = {ratio:.3f}; paper 3.05",
        f"the speed-up in target calls is {rejections.calls(chain).tokens_per_call:.3f}, not {ratio:.3f}: "
        "calls are rejections + 1 unless the last token was rejected",
    )


def figure_2b(chain: Chain, runs: int) -> Figure:
    """The same for batches of 4 and 5 drafts."""
    curves, texts = [], []
    for series, (drafts, value) in enumerate(((4, 14.220), (5, 14.012))):
        estimate, some = _running(chain, drafts, runs, series)
        curves += [*some, curve(f"paper, M = {drafts}", "paper", [runs], [value], series=series)]
        texts.append(
            f"M = {drafts}: exact {estimate.exact:.4f}, simulated {estimate.mean:.3f} (z = {estimate.z:+.2f}); paper {value}"
        )
    return Figure(
        "figure-2b",
        (Panel("Batch speculative decoding, T = 50", "runs", "mean number of rejections", tuple(curves)),),
        f"As Figure 2a for M = 4 and 5 drafts a call: running means with one standard error, and the exact values "
        f"(Theorem 3). {runs:,} runs. Crosses: the paper's values.",
        "; ".join(texts),
        "our instance is not the paper's: over 60 seeds the exact values are 14.03 and 13.81, with standard deviation 0.23",
    )


def figure_2c(chain: Chain, runs: int) -> Figure:
    """Expected rejections over the number of drafts."""
    counts = _log_counts(2000)
    few = (1, 2, 4, 8, 16, 64, 256)
    estimates = [simulate.speculative(chain, runs, SEED, m).rejections for m in few]
    exact, limit = batch.sweep(chain, counts), batch.expected_rejections(chain, math.inf)
    worst = max(abs(e.z or 0.0) for e in estimates)
    return Figure(
        "figure-2c",
        (
            Panel(
                "Number of drafts, T = 50",
                "drafts M",
                "expected rejections",
                (
                    curve("exact", "exact", counts, exact),
                    points("simulated", few, estimates),
                    curve("limit of many drafts", "limit", [1, 2000], [limit, limit]),
                    curve("paper", "paper", [1, 2000], [16.41, 12.36]),
                ),
                log_x=True,
            ),
        ),
        f"Exact expected rejections over the number of drafts M (Theorem 3), the limit (Proposition 1), and simulated means "
        f"({runs:,} runs; bars: 3 standard errors). Crosses: the paper's ends. The axis of M is logarithmic here.",
        f"M = 1: {exact[0]:.4f}, M = 2000: {exact[-1]:.4f}, limit {limit:.4f}; "
        f"paper 16.41 and 12.36. Largest |z| of the simulations {worst:.2f}",
        "another instance. The gain is bounded: with M drafts at the root and one below it, a call gains at most one token",
    )


def figure_5(chain: Chain, runs: int) -> Figure:
    """T = 100: plain, two drafts, and the number of drafts."""
    one, first = _running(chain, 1, runs, series=0)
    two, second = _running(chain, 2, runs, series=0)
    counts, few = _log_counts(2000), (1, 2, 5, 10, 20, 50, 150)
    exact, limit = batch.sweep(chain, counts), batch.expected_rejections(chain, math.inf)
    estimates = [simulate.speculative(chain, runs, SEED + 1, m).rejections for m in few]
    named = ", ".join(f"{v:.3f}" for v in batch.sweep(chain, SWEEP))
    y = "mean number of rejections"
    return Figure(
        "figure-5",
        (
            Panel("Speculative decoding, T = 100", "runs", y, (*first, curve("paper", "paper", [runs], [33.53]))),
            Panel("Two drafts, T = 100", "runs", y, (*second, curve("paper", "paper", [runs], [30.96]))),
            Panel(
                "Number of drafts, T = 100",
                "drafts M",
                "expected rejections",
                (
                    curve("exact", "exact", counts, exact),
                    points("simulated", few, estimates),
                    curve("limit of many drafts", "limit", [1, 2000], [limit, limit]),
                    curve("paper", "paper", SWEEP, PAPER_FIGURE_5),
                ),
                log_x=True,
            ),
        ),
        f"As Figures 2a to 2c for T = 100: plain, M = 2, and over M. {runs:,} runs. Crosses: the paper's values.",
        f"exact {one.exact:.3f} and {two.exact:.3f}, simulated {one.mean:.3f} (z = {one.z:+.2f}) and {two.mean:.3f} "
        f"(z = {two.z:+.2f}); paper 33.53 and 30.96. Over M = {', '.join(map(str, SWEEP))}: {named}; limit {limit:.3f}",
        "another instance: from M = 2 on the paper's curve is higher by 0.09 to 0.19, within the spread between seeds. "
        "Its caption names Theorem 1 for the curve over M; it is Theorem 3",
    )


def _running(chain: Chain, drafts: int, runs: int, series: int) -> tuple[simulate.Estimate, list[Curve]]:
    """The running mean at 200 numbers of runs, with its standard error, and the exact value."""
    result = simulate.speculative(chain, runs, SEED + drafts, drafts)
    n = np.unique(np.linspace(max(1, runs // 200), runs, 200).astype(int))
    means = np.cumsum(result.rejected.sum(axis=1))[n - 1] / n
    deviation = rejections.rejection_moments(chain, drafts).standard_deviation
    exact = result.rejections.exact or 0.0
    many = f", M = {drafts}" if drafts > 1 else ""
    return result.rejections, [
        curve(f"simulated{many}", "simulated", n, means, deviation / np.sqrt(n), series),
        curve(f"exact{many}", "exact", [int(n[0]), runs], [exact, exact], series=series),
    ]


def _log_counts(most: int) -> list[int]:
    """About 60 whole numbers from 1 to `most`, evenly spread on a logarithmic axis."""
    return sorted({round(m) for m in np.geomspace(1, most, 60)})
