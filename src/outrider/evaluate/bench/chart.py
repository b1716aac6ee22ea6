"""Charts of a preset: measured bars with intervals, and, in a picture of their own, predicted ones. Never in one axis.

Pictures are drawn by matplotlib (`pip install "outrider[plot]"`) as SVG and PNG; the same numbers give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outrider.build import Engine
from outrider.errors import ConfigError
from outrider.evaluate.bench.presets import Spec
from outrider.evaluate.bench.scale import TARGETS, Predicted, carry_over, predict_arm
from outrider.evaluate.measure import Arm
from outrider.evaluate.records import Record
from outrider.evaluate.statistics.ratios import Ratio, ratio_of_sums
from outrider.models.gguf.parts import all_parts, is_gguf
from outrider.theory.hardware import Hardware

COLOURS = {
    "nothing": "#8c8c8c", "model": "#c1440e", "heads": "#2a7f9e", "sequence": "#2a7f9e", "layer": "#6a8fd0", "block": "#7a5195",
}  # fmt: skip
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One measured arm: tokens per second and tokens per step with 95% intervals over prompts, draft time per step in ms.

    acceptance: by position, see `scale.survival`.
    """

    name: str
    cost: str
    tokens_per_second: Ratio
    acceptance_length: Ratio
    draft_ms: float
    acceptance: tuple[float, ...]
    nodes: float


def measured(specs: Sequence[Spec], records: Sequence[Record]) -> list[Row]:
    """A row for every arm that has records; a group with a failed request enters no rate of any arm."""
    failed = {(r.group, r.repeat) for r in records if r.failed}
    rows = []
    for spec in specs:
        mine = [r for r in records if r.arm == spec.name and (r.group, r.repeat) not in failed]
        if not mine:
            continue
        groups = sorted({r.group for r in mine})
        tokens, seconds, emitted, steps = (
            np.array([sum(number(r) for r in mine if r.group == g) for g in groups], dtype=float)
            for number in (
                lambda r: r.tokens,
                lambda r: r.seconds,
                lambda r: r.counts.tokens,
                lambda r: r.counts.steps,
            )
        )
        seen = carry_over(spec, mine)
        rows.append(
            Row(
                spec.name,
                spec.cost,
                ratio_of_sums(tokens, seconds),
                ratio_of_sums(emitted, steps),
                1e3 * sum(r.phases["draft"] for r in mine) / float(steps.sum()),
                seen.acceptance,
                seen.nodes,
            )
        )
    return rows


def predicted(
    specs: Sequence[Spec], records: Sequence[Record], shares: Mapping[str, float], hardware: Hardware
) -> list[Predicted]:
    """A bar for every arm and every size of TARGETS, from the acceptance that was measured."""
    out = []
    for spec in specs:
        mine = [r for r in records if r.arm == spec.name and not r.failed]
        if mine and (spec.cost != "model" or shares.get(spec.name)):
            arm = carry_over(spec, mine, shares.get(spec.name, 0.0))
            out += [predict_arm(arm, size, hardware) for size in TARGETS]
    return out


def shares_of(engine: Engine, arms: Sequence[Arm], specs: Sequence[Spec]) -> dict[str, float]:
    """For every draft-model arm the bytes of its weights over the target's, read off the files both were loaded from."""
    cost = {s.name: s.cost for s in specs}
    if engine.loaded is None or engine.loaded.path is None:
        return {}
    whole, out = _bytes(engine.loaded.path), {}
    for arm in arms:
        loaded = arm.engine.loaded
        if cost.get(arm.name) == "model" and loaded is not None and whole:
            out[arm.name] = _bytes(str(loaded.options.draft)) / whole
    return out


def _bytes(place: str) -> int:
    path = Path(place).expanduser()
    return sum(f.stat().st_size for f in (all_parts(path) if is_gguf(path) else path.glob("*.safetensors")))


# ------------------------------------------------------------------------------------------------------------ pictures
def save(
    rows: Sequence[Row], bars: Sequence[Predicted], document: Mapping[str, Any], hardware: Hardware, folder: Path
) -> list[Path]:
    """Write measured.svg, measured.png, predicted.svg and predicted.png into `folder`.

    Raises ConfigError where matplotlib is missing or the folder cannot be written.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        raise ConfigError('charts need matplotlib: pip install "outrider[plot]"') from None
    cost = {r.name: r.cost for r in rows}
    files: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in (
            ("measured", lambda: _draw_measured(rows, document)),
            ("predicted", lambda: _draw_predicted(bars, cost, hardware)),
        ):
            with rc_context({**STYLE, "svg.hashsalt": name}):  # names within the file would be random otherwise
                canvas = draw()
                svg, png = folder / f"{name}.svg", folder / f"{name}.png"
                canvas.savefig(svg, metadata={"Date": None})
                canvas.savefig(png, dpi=200, metadata={"Software": None})
            files += [svg, png]
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return files


def _draw_measured(rows: Sequence[Row], d: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9.2, 1.4 + 0.36 * len(rows)), layout="constrained")
    left, right = canvas.subplots(1, 2, sharey=True)
    canvas.suptitle(
        f"Measured, 95% over prompts: temperature {d['temperature']:g}, batch {d['batch']}, {d['dtype']}, "
        f"{d['machine']['cpu']}, {d['machine']['threads']} thread{'s' * (d['machine']['threads'] > 1)}"
        + ("" if d.get("lossless", True) else f"\nLOSSY rule {d['rule']}: not the target's distribution"),
        fontsize=9,
    )
    names = [r.name for r in rows]
    for ax, title, ratios in (
        (left, "tokens per second", [r.tokens_per_second for r in rows]),
        (right, "tokens per step (acceptance length)", [r.acceptance_length for r in rows]),
    ):
        _bars(ax, names, ratios, [COLOURS[r.cost] for r in rows])
        ax.set_xlabel(title)
    left.invert_yaxis()
    return canvas


def _draw_predicted(bars: Sequence[Predicted], cost: Mapping[str, str], hardware: Hardware) -> Any:
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(b.target for b in bars))
    count = max((sum(b.target == s for b in bars) for s in sizes), default=1)
    canvas = Figure(figsize=(3.6 * max(1, len(sizes)), 1.6 + 0.36 * count), layout="constrained")
    axes = canvas.subplots(1, max(1, len(sizes)), sharey=True, squeeze=False)[0]
    canvas.suptitle(
        f"PREDICTED, not measured: a roofline on {hardware.name}, one sequence, with the acceptance measured here",
        fontsize=9,
    )
    for ax, size in zip(axes, sizes, strict=False):
        mine = [b for b in bars if b.target == size]
        _bars(
            ax, [b.arm for b in mine], [b.tokens_per_second for b in mine], [COLOURS[cost[b.arm]] for b in mine], "//"
        )
        ax.set_title(f"{size.upper()} on {mine[0].devices} device{'s' * (mine[0].devices > 1)}", fontsize=9)
        ax.set_xlabel("predicted tokens per second")
    axes[0].invert_yaxis()
    return canvas


def _bars(ax: Any, names: Sequence[str], ratios: Sequence[Ratio], colours: Sequence[str], hatch: str = "") -> None:
    values = [r.value for r in ratios]
    below = [max(0.0, r.value - r.low) if r.low == r.low else 0.0 for r in ratios]
    above = [max(0.0, r.high - r.value) if r.high == r.high else 0.0 for r in ratios]
    fill = "white" if hatch else None
    ax.barh(
        range(len(names)), values, xerr=[below, above], color=fill or list(colours), edgecolor=list(colours), hatch=hatch,
        error_kw={"ecolor": "#222222", "capsize": 3, "linewidth": 1},
    )  # fmt: skip
    ax.set_yticks(range(len(names)), list(names))
    top = max((v + a for v, a in zip(values, above, strict=True)), default=1.0)
    for i, (v, a) in enumerate(zip(values, above, strict=True)):
        ax.text(v + a + 0.015 * top, i, f"{v:,.3g}" if v < 100 else f"{v:,.0f}", va="center", fontsize=8)
    ax.set_xlim(0, 1.16 * top)


def inline(files: Sequence[Path]) -> list[str]:
    """The SVG files as elements of an HTML page."""
    return [re.sub(r"^.*?(?=<svg)", "", f.read_text(encoding="utf-8"), flags=re.S) for f in files if f.suffix == ".svg"]


def to_json(rows: Sequence[Row], bars: Sequence[Predicted], hardware: Hardware) -> dict[str, Any]:
    """Both charts as data, apart."""
    return {
        "measured": [asdict(r) for r in rows],
        "predicted": {"hardware": hardware.name, "bars": [asdict(b) for b in bars]},
    }
