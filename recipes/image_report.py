"""Measures of `image_tokens.py`: every arm's ledger, tokens per pass, audit and quality; the figures and the tables of the page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import image_data
import numpy as np

from outrider.evaluate.audit.audit import Auditor, audit
from outrider.evaluate.audit.findings import AuditOptions
from outrider.evaluate.audit.sources import of_engine
from outrider.evaluate.images import Drawing, Painter, load_painter
from outrider.evaluate.measure import machine
from outrider.evaluate.png import enlarged, grid, png
from outrider.evaluate.statistics.ratios import paired_ratio, ratio_of_sums
from outrider.files import write_whole
from outrider.params import SamplingParams
from outrider.telemetry.ledger import ledger

LENGTH = 5
COMPONENTS = 16
AUDITED = 50_000
"""Tokens of the audit, shared among the exact arms."""
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
    for budget in (0.02, 0.05, 0.1):
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
        return cls(mean, axes, (real - mean) @ axes, pixels, LogisticRegression(max_iter=400).fit(low / low.std(0), classes))

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
        folder / "target", arm.draft, length=arm.length, rule=arm.rule, slots=64, allow_lossy=arm.lossy
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


def audited(painter: Painter, images: image_data.Images, tokens: int) -> dict[str, Any]:
    """The black-box audit of an arm's engine on at least `tokens` tokens."""
    prompts = [images.raster.prompt(name) for name in images.raster.classes]
    params = painter.request(None, 0)[1]
    options = AuditOptions(params, detect=0.05)
    auditor = Auditor(painter.engine.parts.target, None, options)
    samples = -(-tokens // (images.raster.tokens * len(prompts)))
    found = audit(of_engine(painter.engine, params), prompts, auditor, samples=samples)
    return {"tokens": found.tokens, "outcome": found.outcome, "sentence": found.sentence, "planted": found.control_planted}


def evaluate(folder: Path, images: image_data.Images, work: Path, count: int = 400) -> None:
    """Measure every arm; keeps what is done, so that it can be stopped at any moment."""
    place = work / "measured"
    judge = Judge.of(
        pixels_of(images, images.training), images.training_class, pixels_of(images, images.held_out)
    )
    floor = bootstrap(judge.low(pixels_of(images, images.training[: len(images.held_out)])), judge.real)
    classes = np.asarray([images.raster.classes[name] for name, _ in wanted(images, count)])
    plain: list[Drawing] = []
    for arm in arms(folder):
        file = place / f"{arm.name.replace(' ', '-')}.json"
        if file.is_file():
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
            made["audit"] = audited(painter, images, AUDITED // 4)
        write_whole(file, (json.dumps(made) + "\n").encode())
        show(arm, drawings, work)
        print(f"{arm.name}: {made['per_pass'][0]:.2f} tokens a pass, ledger {made['ledger']}, {made.get('audit')}", flush=True)
    del plain


def show(arm: Arm, drawings: list[Drawing], work: Path, count: int = 10) -> None:
    """One row of pictures of an arm, tinted by origin."""
    np.save(work / f"row-{arm.name.replace(' ', '-')}.npy", grid([d.coloured() for d in drawings[:count]], count))
