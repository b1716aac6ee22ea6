"""Measures of `image_tokens.py`: every arm's ledger, tokens per pass, audit and quality; the figures and the tables of the page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import image_data
import image_distance
import numpy as np

from outrider.evaluate.audit.audit import Auditor
from outrider.evaluate.audit.findings import AuditOptions
from outrider.evaluate.audit.sources import Emission
from outrider.evaluate.images import Drawing, Painter, load_painter
from outrider.evaluate.measure import machine
from outrider.evaluate.png import enlarged, grid, png
from outrider.evaluate.statistics.ratios import paired_ratio, ratio_of_sums
from outrider.files import write_whole
from outrider.telemetry.ledger import ledger

LENGTH = 5
COMPONENTS = 16
PICTURES = 200
"""Of each arm. Four exact arms are audited: 51,200 tokens."""
BEGIN, END = "<!-- measured: recipes/image_tokens.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Arm:
    """One way to draw. base: the arm it is compared with, in tokens per pass."""

    name: str
    draft: str
    rule: str = "speculative_sampling"
    length: int = LENGTH
    audited: bool = False
    base: str = ""

    @property
    def lossy(self) -> bool:
        return self.rule.partition(":")[0] in ("tv_budget", "neighbours", "cluster")


def arms(folder: Path) -> list[Arm]:
    """Every arm. Lossy ones draft with the distilled draft, and have the same budgets per token."""
    draft, counts, eagle = (str(folder / part) for part in ("draft", "counts", "eagle"))
    out = [
        Arm("plain", "none", length=0),
        Arm("draft", draft, "block", audited=True),
        Arm("tree 2x2x1", f"tree:2x2x1:{draft}", "optimal_transport"),
        Arm("counts", f"counts:{counts}", "block", audited=True),
        Arm("EAGLE", f"eagle:{eagle}", "block"),
        Arm("jacobi, fresh noise", "jacobi:5:fresh"),
        Arm("jacobi", "jacobi:5", audited=True, base="jacobi, fresh noise"),
        Arm("jacobi up, fresh noise", "jacobi:5:up:fresh"),
        Arm("jacobi up", "jacobi:5:up", audited=True, base="jacobi up, fresh noise"),
    ]
    for budget in (0.05, 0.1):
        out += [
            Arm(f"tv_budget {budget}", draft, f"tv_budget:per_token={budget}"),
            Arm(f"neighbours {budget}", draft, f"neighbours:delta=0.3,per_token={budget}"),
            Arm(f"cluster {budget}", draft, f"cluster:near=0.2,per_token={budget}"),
        ]
    return out


# --- quality ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """What real images say about drawn ones: principal components, and a classifier, both of training images alone."""

    mean: np.ndarray
    axes: np.ndarray
    real: np.ndarray
    seen: np.ndarray
    classifier: Any

    @classmethod
    def of(cls, pixels: np.ndarray, classes: np.ndarray, real: np.ndarray) -> Judge:
        """pixels: training images [n, d]. real: held-out ones."""
        from sklearn.linear_model import LogisticRegression

        mean = pixels.mean(0)
        axes = np.linalg.svd(pixels - mean, full_matrices=False)[2][:COMPONENTS].T
        low = (pixels - mean) @ axes
        return cls(
            mean, axes, (real - mean) @ axes, pixels, LogisticRegression(max_iter=400).fit(low / low.std(0), classes)
        )

    def low(self, pixels: np.ndarray) -> np.ndarray:
        return (pixels - self.mean) @ self.axes

    def agreement(self, pixels: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Whether the classifier sees the class that was asked for."""
        scale = self.low(self.seen).std(0)
        return (self.classifier.predict(self.low(pixels) / scale) == classes).astype(float)

    def nearest(self, pixels: np.ndarray) -> np.ndarray:
        """Root mean square distance of each image to the nearest training image, 1 for full contrast."""
        square = (pixels**2).sum(1)[:, None] + (self.seen**2).sum(1)[None] - 2 * pixels @ self.seen.T
        return np.sqrt(np.maximum(square.min(1), 0) / pixels.shape[1])


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two normal distributions with the moments of two sets of points."""
    ca, cb = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(ca)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cb @ root), 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * cross)


def bootstrap(a: np.ndarray, b: np.ndarray, base: np.ndarray | None = None, rounds: int = 200) -> list[float]:
    """Fréchet distance of `a` to the real images `b`, minus that of `base`, with a 95% interval over drawn images."""
    draw = np.random.default_rng(0)
    pick = lambda x: x[draw.integers(len(x), size=len(x))]  # noqa: E731
    value = frechet(a, b) - (0.0 if base is None else frechet(base, b))
    found = [frechet(pick(a), b) - (0.0 if base is None else frechet(pick(base), b)) for _ in range(rounds)]
    low, high = np.percentile(found, [2.5, 97.5])
    return [value, float(low), float(high)]


def pixels_of(images: image_data.Images, tokens: np.ndarray) -> np.ndarray:
    """Pixels [n, h * w] in 0 .. 1."""
    return np.stack([images.raster.pixels(row.tolist()) for row in tokens]).reshape(len(tokens), -1) / 255.0


# --- one arm ---------------------------------------------------------------------------------------------------------


def wanted(images: image_data.Images, count: int) -> list[tuple[str | None, int]]:
    """Class and seed of every picture, the same for every arm."""
    names = list(images.raster.classes)
    return [(names[i % len(names)], 10_000 + i) for i in range(count)]


def run(arm: Arm, folder: Path, images: image_data.Images, count: int) -> tuple[dict[str, Any], list[Drawing], Painter]:
    """The counts of an arm, its pictures and its engine."""
    painter = load_painter(
        folder / "target", arm.draft, length=arm.length, rule=arm.rule, slots=64, allow_lossy=arm.lossy, dtype="float32"
    )
    jobs = wanted(images, count)
    results = painter.engine.generate(
        [painter.request(*job)[0] for job in jobs], [painter.request(*job)[1] for job in jobs]
    )
    outputs = [r.outputs[0] for r in results]
    drawings = [Drawing(images.raster, list(o.token_ids), list(o.origins)) for o in outputs]
    tokens = np.asarray([len(o.token_ids) for o in outputs], dtype=float)
    passes = np.asarray([o.counts.steps for o in outputs], dtype=float)
    bias = np.asarray([o.counts.bias for o in outputs])
    book, length = ledger(painter.engine.counts), ratio_of_sums(tokens, passes)
    made = {
        "arm": asdict(arm),
        "tokens": int(tokens.sum()),
        "per_pass": [length.value, length.low, length.high],
        "passes": passes.tolist(),
        "ledger": [book.predicted, book.observed, book.low, book.high],
        "tv_per_token": float(bias.sum() / tokens.sum()),
        "tv_most": float(bias.max()),
    }
    return made, drawings, painter


def audited(painter: Painter, images: image_data.Images, drawings: list[Drawing]) -> dict[str, Any]:
    """The black-box audit of the pictures of an arm: against the target's distribution, and against nothing else."""
    params = painter.request(None, 0)[1]
    auditor = Auditor(painter.engine.parts.target, None, AuditOptions(params, detect=0.05))
    names = [name for name, _ in wanted(images, len(drawings))]
    for name in images.raster.classes:  # pictures of one prompt one after another
        mine = [tuple(d.tokens) for d, other in zip(drawings, names, strict=True) if other == name]
        for i, tokens in enumerate(mine):
            auditor.add(images.raster.prompt(name), Emission(tokens), mine[max(0, i - 2) : i])
    found = auditor.verdict()
    return {
        "tokens": found.tokens,
        "outcome": found.outcome,
        "sentence": found.sentence,
        "planted": found.control_planted,
    }


def evaluate(folder: Path, images: image_data.Images, work: Path, count: int = PICTURES) -> None:
    """Measure every arm; keeps what is done, so that it can be stopped at any moment."""
    place = work / "measured"
    judge = Judge.of(pixels_of(images, images.training), images.training_class, pixels_of(images, images.held_out))
    floor = bootstrap(judge.low(pixels_of(images, images.training[: len(images.held_out)])), judge.real)
    classes = np.asarray([images.raster.classes[name] for name, _ in wanted(images, count)])
    for arm in arms(folder):
        file = place / f"{arm.name.replace(' ', '-')}.json"
        if file.is_file() or (arm.name == "EAGLE" and not (folder / "eagle").is_dir()):
            continue
        made, drawings, painter = run(arm, folder, images, count)
        pixels = pixels_of(images, np.asarray([d.tokens for d in drawings]))
        low = judge.low(pixels)
        made |= {
            "distance": bootstrap(low, judge.real),
            "floor": floor,
            "agreement": float(judge.agreement(pixels, classes).mean()),
            "nearest": float(judge.nearest(pixels).mean()),
            "real_nearest": float(judge.nearest(pixels_of(images, images.held_out)).mean()),
        }
        if arm.name == "plain":
            np.save(place.with_suffix(".npy"), low)
        else:
            made["more_distance"] = bootstrap(low, judge.real, np.load(place.with_suffix(".npy")))
        if arm.audited:
            made["audit"] = audited(painter, images, drawings)
        write_whole(file, (json.dumps(made) + "\n").encode())
        show(arm, drawings, work)
        print(
            f"{arm.name}: {made['per_pass'][0]:.2f} tokens a pass, ledger {made['ledger']}, {made.get('audit')}",
            flush=True,
        )
    if not (moved := work / "moved.json").is_file():
        found = image_distance.measure(folder, images, wanted(images, 60))
        write_whole(moved, (json.dumps(found) + "\n").encode())


def show(arm: Arm, drawings: list[Drawing], work: Path, count: int = 10) -> None:
    """One row of pictures of an arm, tinted by origin."""
    np.save(work / f"row-{arm.name.replace(' ', '-')}.npy", grid([d.coloured() for d in drawings[:count]], count))


# --- the page --------------------------------------------------------------------------------------------------------

SHOWN = ("plain", "draft", "jacobi up", "tv_budget 0.1", "neighbours 0.1", "cluster 0.1")
"""Arms of the picture grid, a row each."""


def measured(work: Path, kind: str) -> list[dict[str, Any]]:
    """What was measured of a kind, in the order of the arms."""
    place = work / kind / "measured"
    files = [place / f"{arm.name.replace(' ', '-')}.json" for arm in arms(Path())]
    return [json.loads(f.read_text()) for f in files if f.is_file()]


def page(work: Path, docs: Path) -> None:
    """The tables of docs/images.md, its grid and its figure."""
    parts, moved = [], {}
    for kind in ("digits", "textures"):
        found = measured(work, kind)
        if not found:
            continue
        parts.append(table(kind, found))
        if (file := work / kind / "moved.json").is_file():
            moved[kind] = json.loads(file.read_text())
            parts.append(
                f"How far the rules move probability, {kind}:\n\n" + "\n".join(image_distance.table(moved[kind]))
            )
        rows = [work / kind / f"row-{name.replace(' ', '-')}.npy" for name in SHOWN]
        rows = [np.load(r) for r in rows if r.is_file()]
        scale = 6 if kind == "digits" else 2
        write_whole(docs / "figures" / "images" / f"{kind}.png", png(enlarged(grid(rows, 1, gap=2), scale)))
    figure(work, docs / "figures" / "images" / "distance.svg")
    image_distance.figure(moved, docs / "figures" / "images" / "moved.svg")
    m = machine()
    parts.append(f"{m['cpu']}, torch {m['versions']['torch']}, a shared machine (nothing in these tables is a time).")
    path = docs / "images.md"
    before, rest = path.read_text(encoding="utf-8").split(BEGIN, 1)
    text = "\n\n".join(parts)
    write_whole(path, f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}".encode())


def table(kind: str, found: list[dict[str, Any]]) -> str:
    """One kind's arms as a table."""
    lines = [
        f"**{kind.capitalize()}**, {found[0]['tokens']:,} tokens an arm:",
        "",
        "| arm | tokens per pass | rejections: predicted, observed (band) | TV per token | distance to real | more than plain "
        "| class | nearest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    band = lambda v, d=2: f"{v[0]:.{d}f} ({v[1]:.{d}f} to {v[2]:.{d}f})"  # noqa: E731
    for f in found:
        low = f["ledger"]
        book = f"{low[0]:.0f}, {low[1]} ({low[2]:.0f} to {low[3]:.0f})" if low[0] else ""
        more = band(f["more_distance"]) if "more_distance" in f else ""
        spent = f"{f['tv_per_token']:.4f}" if f["tv_per_token"] else "0"
        cells = (
            f["arm"]["name"], band(f["per_pass"]), book, spent, band(f["distance"]), more,
            f"{f['agreement']:.3f}", f"{f['nearest']:.3f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Real training images are {band(found[0]['floor'])} from the held-out ones; held-out images are "
              f"{found[0]['real_nearest']:.3f} from their nearest training image."]  # fmt: skip
    by = {f["arm"]["name"]: f for f in found}
    for f in found:
        if f["arm"]["base"] in by:
            tokens, base = (
                np.full(len(x["passes"]), x["tokens"] / len(x["passes"])) for x in (f, by[f["arm"]["base"]])
            )
            r = paired_ratio(tokens, np.asarray(f["passes"]), base, np.asarray(by[f["arm"]["base"]]["passes"]))
            lines += [
                "",
                f"`{f['arm']['name']}` against `{f['arm']['base']}`: {band((r.value, r.low, r.high), 3)} times the tokens "
                "per pass.",
            ]
    for f in found:
        if "audit" in f:
            lines += ["", f"Audit of `{f['arm']['name']}`, {f['audit']['tokens']:,} tokens: {f['audit']['sentence']}."]
    return "\n".join(lines)


def figure(work: Path, path: Path) -> None:
    """More distance than plain against tokens per pass, an arm a point."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "images", "svg.fonttype": "none", "font.size": 9})
    fig, panels = pyplot.subplots(1, 2, figsize=(11, 3.6), squeeze=False)
    for axis, kind in zip(panels[0], ("digits", "textures"), strict=True):
        for f in measured(work, kind):
            if "more_distance" not in f:
                continue
            value, low, high = f["more_distance"]
            name, mark = f["arm"]["name"], "s" if f["tv_per_token"] else "o"
            x = f["per_pass"][0]
            spread = [[max(0, value - low)], [max(0, high - value)]]
            axis.errorbar(x, value, yerr=spread, fmt=mark, markersize=4, capsize=2, label=name)
        axis.axhline(0, color="grey", linewidth=0.6)
        axis.set_xlabel("tokens per target pass")
        axis.set_title(kind)
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    panels[0][0].set_ylabel("distance to real, minus plain's")
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, metadata={"Date": None})
