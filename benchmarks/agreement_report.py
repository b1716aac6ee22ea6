"""The page and the figures of `agreement.py`, from the numbers it left on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"


def write(folder: Path) -> None:
    """docs/agreement.md and docs/figures/agreement_*.svg."""
    parts = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in ("lengths", "positions", "several", "others", "front")
    }
    (DOCS / "figures").mkdir(parents=True, exist_ok=True)
    draw(parts, DOCS / "figures")
    (DOCS / "agreement.md").write_text(page(parts))


def yes(agrees: bool) -> str:
    return "yes" if agrees else "**no**"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows]])


def page(parts: dict[str, Any]) -> str:
    text = (Path(__file__).parent / "agreement.md.in").read_text()
    for name, make in (
        ("lengths", lengths),
        ("several", several),
        ("others", several),
        ("front", front),
        ("arms", arms),
    ):
        text = text.replace("{{" + name + "}}", make(parts["front"] if name == "arms" else parts[name]))
    return text


def lengths(rows: list[dict[str, Any]]) -> str:
    out = []
    for r in rows:
        a, b = r["rejections"], r["tokens_per_step"]
        out.append(
            [
                f"{r['temperature']:g}",
                str(r["length"]),
                r["rule"],
                f"{a['predicted']:.0f} ({a['low']:.0f} to {a['high']:.0f})",
                str(a["observed"]),
                yes(a["agrees"]),
                f"{b['predicted']:.3f} ({b['low']:.3f} to {b['high']:.3f})",
                f"{b['observed']:.3f}",
                yes(b["agrees"]),
                yes(r["ledger"]["agrees"]),
            ]
        )
    head = ["T", "length", "rule", "rejections predicted (95%)", "observed", "inside"]
    return table([*head, "tokens per step predicted (95%)", "observed", "inside", "ledger agrees"], out)


def several(rows: list[dict[str, Any]]) -> str:
    out = []
    for r in rows:
        before = r["before"]
        out.append(
            [
                str(r["drafts"]),
                r["rule"],
                r["shape"],
                f"{before['tokens_per_step']:.3f} ({before['low']:.3f} to {before['high']:.3f})" if before else "",
                f"{r['tokens_per_step']:.3f}",
                yes(before["agrees"]) if before else "",
                f"{before['first_accepted']:.3f}" if before else "",
                f"{r['first_accepted']:.3f}",
                f"{r['predicted']:.0f} ({r['low']:.0f} to {r['high']:.0f})",
                str(r["observed"]),
                yes(r["agrees"]),
            ]
        )
    head = [
        "drafts",
        "rule",
        "tree",
        "tokens per step predicted (95%)",
        "observed",
        "inside",
        "first accepted predicted",
        "observed",
    ]
    return table([*head, "rejections by the ledger (95%)", "observed", "inside"], out)


def front(part: dict[str, Any]) -> str:
    out = [
        [
            f"{p['budget']:g}",
            f"{p['bias']:.4f}",
            f"{p['predicted']:.4f}",
            f"{p['rejection']:.4f} ± {1.96 * p['error']:.4f}",
            yes(abs(p["rejection"] - p["predicted"]) <= 1.96 * p["error"] + 1e-12),
            yes(p["ledger"]["agrees"]),
            f"{p['log_likelihood']['mean']:.3f} ± {1.96 * p['log_likelihood']['error']:.3f}",
        ]
        for p in part["points"]
    ]
    head = ["budget per token", "bias metered", "rejection predicted", "rejection observed", "inside", "ledger agrees"]
    return table([*head, "log-likelihood, nats per token"], out)


def arms(part: dict[str, Any]) -> str:
    out = [
        [
            f"{p['eps']:g}",
            p["residual"],
            f"{p['bias']:.4f}",
            f"{p['rejection']:.4f}",
            f"{p['bias'] + p['rejection']:.4f}",
            f"{p['log_likelihood']['mean']:.3f} ± {1.96 * p['log_likelihood']['error']:.3f}",
        ]
        for p in part["arms"]
    ]
    return table(
        ["eps", "residual", "bias per judged token", "rejection", "sum", "log-likelihood, nats per token"], out
    )


def draw(parts: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"svg.hashsalt": "outrider", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    )

    def save(name: str) -> None:
        for kind in ("svg", "png"):
            plt.savefig(
                folder / f"agreement_{name}.{kind}",
                bbox_inches="tight",
                dpi=120,
                metadata={"Date": None} if kind == "svg" else {},
            )
        plt.close()

    draw_positions(plt, parts["positions"])
    save("positions")
    draw_several(plt, parts["several"])
    save("several")
    draw_front(plt, parts["front"])
    save("front")


def draw_positions(plt: Any, p: dict[str, Any]) -> None:
    """Rejections along the text: predicted, observed, and the bound."""
    x = range(1, len(p["expected"]) + 1)
    plt.figure(figsize=(6, 4))
    low = [a - 1.96 * e for a, e in zip(p["observed"], p["error"], strict=True)]
    high = [a + 1.96 * e for a, e in zip(p["observed"], p["error"], strict=True)]
    plt.fill_between(x, low, high, color="0.8", label="engine, 95% over prompts")
    plt.plot(x, p["observed"], color="0.2", lw=1.5, label="engine")
    plt.plot(x, p["expected"], color="tab:blue", ls="--", lw=1.5, label=f"predicted, length {p['length']}")
    plt.plot(x, p["bound"], color="tab:orange", ls=":", lw=1.5, label="sum of TV (unlimited length)")
    plt.xlabel("tokens of the text"), plt.ylabel("rejections so far"), plt.legend(frameon=False)


def draw_several(plt: Any, arms: list[dict[str, Any]]) -> None:
    """Tokens per step by the number of drafts, for every shape and rule."""
    plt.figure(figsize=(6, 4))
    styles = {
        ("batch", "speculative_sampling"): ("o-", "root only, recursive"),
        ("batch", "optimal_transport"): ("v-", "root only, optimal"),
        ("shared", "speculative_sampling"): ("s--", "prefixes shared, recursive"),
        ("shared", "k_seq"): ("^-.", "prefixes shared, K-SEQ"),
        ("shared", "optimal_transport"): ("*-", "prefixes shared, optimal"),
        ("tree", "speculative_sampling"): ("d:", "without replacement"),
    }
    one = next(r for r in arms if r["drafts"] == 1 and r["rule"] == "speculative_sampling")
    for (shape, rule), (style, label) in styles.items():
        mine = [r for r in arms if r["rule"] == rule and r["drafts"] > 1 and r["shape"].startswith(shape)]
        plt.plot(
            [1, *(r["drafts"] for r in mine)],
            [one["tokens_per_step"], *(r["tokens_per_step"] for r in mine)],
            style,
            label=label,
        )
    plt.xscale("log", base=2), plt.xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    plt.xlabel("drafts"), plt.ylabel("tokens per step, length 3"), plt.legend(frameon=False)


def draw_front(plt: Any, f: dict[str, Any]) -> None:
    """Rejection against bias: the front, and where the engine's lossy rules stand."""
    plt.figure(figsize=(6, 4))
    plt.plot([0, f["tv"]], [f["tv"], 0], color="0.6", lw=1, label="front: rejection + bias = TV")
    points = f["points"]
    plt.errorbar(
        [q["bias"] for q in points],
        [q["rejection"] for q in points],
        yerr=[1.96 * q["error"] for q in points],
        fmt="o",
        color="0.2",
        capsize=3,
        label="tv_budget, engine",
    )
    for name, mark in (("optimal residual", "^"), ("target as residual", "x")):
        mine = [a for a in f["arms"] if a["residual"] == name]
        plt.plot([a["bias"] for a in mine], [a["rejection"] for a in mine], mark, label=f"min(1, (p + eps)/q), {name}")
    (
        plt.xlabel("bias per judged token (total variation)"),
        plt.ylabel("rejection probability"),
        plt.legend(frameon=False),
    )
