"""Pictures for notebooks, by matplotlib, without pyplot: nothing global, and nothing to close."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from outrider.errors import ConfigError

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#8c8c8c")
"""Of Okabe and Ito's palette."""


def new_picture(panels: int = 1) -> tuple[Any, list[Any]]:
    """A matplotlib figure that a notebook shows, and its axes side by side. ConfigError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('pictures need matplotlib: pip install "outrider[plot]"') from None

    class Picture(Figure):
        """A figure that shows itself: notebooks draw those of pyplot only."""

        def _repr_png_(self) -> bytes:
            file = BytesIO()
            self.savefig(file, format="png", dpi=110)
            return file.getvalue()

    figure = Picture(figsize=(4.8 * panels, 3.2), layout="constrained")
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes
