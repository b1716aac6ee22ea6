"""The figures of Yin et al., NeurIPS 2024, recomputed: exact curves, simulated ones, and the paper's values beside them.

The paper's own random instance is not published (its Appendix F gives 7 states, seed 10 and the horizons, not how rows
are drawn), so these are the curves of another instance of the same kind: `chains.best_guess`. Values of the paper were
read off its plots, to about 0.01 to 0.03. What is to be compared is therefore exact against simulated on our instance,
and the size and shape of the curves against the paper.

`all_figures` needs numpy and scipy; `write` draws, and needs matplotlib (`pip install "outrider[plot]"`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from outrider.theory import chains
from outrider.theory.checks import positive_int
from outrider.theory.figures.chain import figure_2a, figure_2b, figure_2c, figure_5
from outrider.theory.figures.distributions import figure_3_left, figure_3_right, figure_4
from outrider.theory.figures.figure import SEED, Curve, Figure, Panel

__all__ = ["Curve", "Figure", "Panel", "all_figures", "index", "write"]

_PREFACE = """# Figures of "A Theoretical Perspective for Speculative Decoding Algorithm", recomputed

M. Yin, M. Chen, K. Huang, M. Wang, NeurIPS 2024 (arXiv 2411.00841). Letters as everywhere in Outrider: p is the target,
q the draft (the paper has them the other way round).

How transition rows are drawn is not stated in the paper. The instance here draws `numpy.random.RandomState(10).rand` for
the draft, then for the target, and normalises rows: 7 states, uniform prompt. It agrees with the paper's plain speculative
decoding to reading accuracy and differs in the batch curves, so it is another instance of the same kind. Crosses are values
read off the paper's plots, to about 0.01 to 0.03. z compares a simulated mean with the exact one, by the exact standard
deviation where that is known: it should look standard normal.

| figure | reproduced | what differs, and why |
|---|---|---|
"""

_ERRATA = """
## Errata of the paper that matter here

- Algorithm 4 as printed samples the residual within the loop over drafts, and takes it once more than its proof: the
  output is then not the target's. The simulations here follow the proof.
- Theorem 3 leaves f of the empty prefix open. It must be 1: the first position is a root.
- Speed-up T / E[rejections] counts rejections, not target calls; calls = rejections + 1 unless the last token was rejected.
- Proposition 1's limit needs the target's support inside the draft's; in general what the draft never proposes remains.
- Figure 3 (right, upper): the curve labelled Ber(0.3) is not that one. Figure 5 cites Theorem 1 for Theorem 3.
- Theorem 2 is about rules that judge each token by the prefix alone. Block verification (Sun et al., ICLR 2025) is outside
  that family, is exact, and rejects less.

The tables of the paper compare real models with human-preference judges; nothing here reproduces them.
"""


def all_figures(runs: int = 20_000) -> list[Figure]:
    """Figures 2a to 5, with `runs` >= 200 simulated outputs wherever something is simulated (20,000 in the paper).

    >>> [f.name for f in all_figures(runs=200)][:4]
    ['figure-2a', 'figure-2b', 'figure-2c', 'figure-3-left']
    """
    runs = positive_int("runs", runs, low=200)
    short, long = chains.best_guess(7, 50, SEED), chains.best_guess(7, 100, SEED)
    return [
        figure_2a(short, runs),
        figure_2b(short, runs),
        figure_2c(short, runs),
        figure_3_left(),
        figure_3_right(runs),
        *figure_4(short, runs),
        figure_5(long, runs),
    ]


def index(figures: Sequence[Figure]) -> str:
    """The Markdown page that shows the figures and says, for each, what was reproduced and what differs."""
    rows = "".join(f"| [{f.name}](#{f.name}) | {_cell(f.reproduced)} | {_cell(f.differs)} |\n" for f in figures)
    shown = "".join(
        f"\n## {f.name}\n\n![{f.name}]({f.name}.png)\n\n{f.caption} ([vector]({f.name}.svg))\n" for f in figures
    )
    return _PREFACE + rows + _ERRATA + shown


def write(figures: Sequence[Figure], out: Path) -> list[Path]:
    """Draw every figure into the folder `out` as SVG and PNG, with `index.md`; the files written, in order.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from outrider.theory.figures import draw

    out.mkdir(parents=True, exist_ok=True)
    files = [file for figure in figures for file in draw.save(figure, out)]
    page = out / "index.md"
    page.write_text(index(figures), encoding="utf-8")
    return [*files, page]


def _cell(text: str) -> str:
    """`text` within a table: a bar would end the cell."""
    return text.replace("|", "\\|")
