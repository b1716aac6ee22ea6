"""Pictures of `figure.Figure` by matplotlib: readable without colour, the same bytes for the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import FancyBboxPatch

from outrider.theory.figures.figure import Curve, Figure, Panel

# Series differ in lightness, dash and marker at once, so that a grey print and a colour-blind reader lose nothing.
_COLOURS = ("#1b1b3a", "#c1440e", "#2a7f9e", "#7a5195", "#6a8f2f", "#8c8c8c")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2, 2, 2)), (0, (3, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "outrider",  # names within the file would be random otherwise
    "svg.fonttype": "none",
}


def save(figure: Figure, out: Path) -> list[Path]:
    """Write `figure` into the folder as SVG and PNG (200 dots per inch)."""
    with rc_context(_STYLE):
        canvas = draw(figure)
        files = [out / f"{figure.name}.{kind}" for kind in ("svg", "png")]
        canvas.savefig(files[0], metadata={"Date": None})
        canvas.savefig(files[1], dpi=200, metadata={"Software": None})
    return files


def draw(figure: Figure) -> Canvas:
    """`figure` on a new canvas: one row of panels, or the schematic where there are none."""
    count = max(1, len(figure.panels))
    canvas = Canvas(figsize=(4.6 * count if count > 1 else 5.6, 3.6), layout="constrained")
    axes = [canvas.add_subplot(1, count, i + 1) for i in range(count)]
    if not figure.panels:
        _schematic(axes[0])
    for panel, ax in zip(figure.panels, axes, strict=False):
        _panel(ax, panel)
    return canvas


def _panel(ax: Axes, panel: Panel) -> None:
    ax.set_title(panel.title, loc="left", fontsize=10)
    ax.set_xlabel(panel.x_label)
    ax.set_ylabel(panel.y_label)
    if panel.log_x:
        ax.set_xscale("log")
    crowded = sum(c.kind == "exact" for c in panel.curves) > 2
    for one in panel.curves:
        _curve(ax, one, crowded)
    for x, y, text in panel.notes:
        ax.text(x, y, text, fontsize=8, color="#333333")
    if crowded:
        simulated = ax.plot(
            [], [], color="#555555", marker="o", markersize=4, markerfacecolor="white", linestyle="none"
        )
        paper = ax.plot([], [], color="#555555", marker="x", markersize=7, linestyle="none")
        simulated[0].set_label("simulated")
        paper[0].set_label("paper")
    many = len(ax.get_legend_handles_labels()[1]) > 5
    if many and not crowded:
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.3 * (high - low))  # room for the legend above the curves
    ax.legend(ncols=2 if many else 1)


def _curve(ax: Axes, one: Curve, crowded: bool) -> None:
    """Exact: lines. Simulated: bands where dense, markers with bars where sparse. The paper's: crosses."""
    colour, dash, marker = (kinds[one.series % len(_COLOURS)] for kinds in (_COLOURS, _DASHES, _MARKERS))
    label = (
        "_" if crowded and one.kind != "exact" else one.label
    )  # one legend entry for all of a kind, made by the panel
    if one.kind == "paper":
        ax.plot(
            one.x,
            one.y,
            color=colour,
            marker="x",
            markersize=7,
            markeredgewidth=1.6,
            linestyle="none",
            label=label,
            zorder=4,
        )
    elif one.kind == "limit":
        ax.plot(one.x, one.y, color="#777777", linestyle=":", linewidth=1.2, label=label)
    elif one.kind == "exact":
        ax.plot(one.x, one.y, color=colour, linestyle=dash, linewidth=1.6, label=label, zorder=2.5)
    elif len(one.x) > 30:
        shade = "#9aa5b1" if one.series == 0 else "#e0a58f"
        if one.error is not None:
            ax.fill_between(one.x, one.y - one.error, one.y + one.error, color=shade, alpha=0.45, linewidth=0)
        ax.plot(
            one.x, one.y, color=colour, linewidth=0.8, linestyle="-", alpha=0.75, label=f"{label} (± standard error)"
        )
    else:
        ax.errorbar(
            one.x,
            one.y,
            yerr=one.error,
            color=colour,
            marker=marker,
            markersize=4,
            markerfacecolor="white",
            linestyle="none",
            elinewidth=1,
            capsize=2,
            label=label,
            zorder=3,
        )


def _schematic(ax: Axes) -> None:
    """Three drafts: the first refused at the root, the second followed to its first refusal, the third unused."""
    ax.set_axis_off()
    ax.set_xlim(-1.75, 4.9)
    ax.set_ylim(-0.85, 3.3)
    rows = (
        (2.6, "draft 1", ("refused", "", "", ""), "against p"),
        (1.6, "draft 2", ("accepted", "accepted", "refused", ""), "against $p^2$"),
        (0.1, "draft 3", ("", "", "", ""), "not needed"),
    )
    looks = {"accepted": ("#2f2f2f", "white"), "refused": ("white", "black"), "": ("#eeeeee", "#999999")}
    for y, name, states, law in rows:
        ax.text(-1.7, y + 0.1, name, va="center", fontsize=9, weight="bold")
        ax.text(-1.7, y - 0.16, law, va="center", fontsize=8, color="#444444")
        for i, state in enumerate(states):
            face, ink = looks[state]
            ax.add_patch(
                FancyBboxPatch(
                    (i * 1.15, y - 0.24),
                    0.9,
                    0.48,
                    boxstyle="round,pad=0.03",
                    facecolor=face,
                    edgecolor="black" if state else "#bbbbbb",
                    linestyle="--" if state == "refused" else "-",
                )
            )
            ax.text(i * 1.15 + 0.45, y, state or "unused", ha="center", va="center", fontsize=8, color=ink)
    ax.annotate("", xy=(-0.15, 1.75), xytext=(-0.15, 2.45), arrowprops={"arrowstyle": "->"})
    ax.text(-0.25, 2.1, "residual", ha="right", va="center", fontsize=8)
    ax.annotate("", xy=(2.75, 1.0), xytext=(2.75, 1.32), arrowprops={"arrowstyle": "->"})
    ax.text(2.75, 0.82, "sample the residual: one rejection, then the next call", ha="center", va="center", fontsize=8)
    ax.text(0.45, 3.0, "root", ha="center", fontsize=8)
    ax.text(2.75, 3.0, "deeper positions: one draft, against p", ha="center", fontsize=8)
    ax.text(
        -1.7, -0.5, "If all M first tokens are refused, sample $p^{M+1}$: that is the root's one rejection.", fontsize=8
    )
