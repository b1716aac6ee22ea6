"""Images as tokens, from what scikit-learn and scikit-image ship: `pip install scikit-learn scikit-image`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from outrider.raster import Raster

Kind = Literal["digits", "textures"]
CODES, PATCH = 256, 4
TEXTURES = ("brick", "grass", "gravel")
HELD_OUT_DIGITS = 297


@dataclass(frozen=True)
class Images:
    """Token images of one kind. raster: what the tokens mean. vocab_size: a multiple of 16. held_out: [n, 64] tokens and their
    class tokens [n]. training: images for measures; batches come from `batch`."""

    kind: Kind
    raster: Raster
    vocab_size: int
    training: np.ndarray
    training_class: np.ndarray
    held_out: np.ndarray
    held_out_class: np.ndarray
    maps: np.ndarray | None = None
    fidelity: str = ""

    def batch(self, step: int, rows: int, steps: int, drop: float, seed: int = 0) -> torch.Tensor:
        """[rows, 65] int64: a class token (`null` in a share `drop` of the rows) and an image; a function of the step alone.

        Digits are shifted by a pixel, less and less often: shifts keep a small model from learning 1,500 images by heart, and the
        last steps see images as they are. Textures are cut anew from their pictures every time.
        """
        draw = np.random.default_rng((seed, step))
        if self.maps is None:
            chosen = draw.integers(len(self.training), size=rows)
            images, classes = self.training[chosen], self.training_class[chosen]
            shifted = draw.random(rows) < 0.8 * max(0.0, 1.0 - step / (0.9 * steps))
            images = np.where(shifted[:, None], _shift(images, draw.integers(-1, 2, size=(rows, 2))), images)
        else:
            images, classes = _crops(self.maps, draw, rows, self.raster)
        classes = np.where(draw.random(rows) < drop, self.raster.null, classes)
        return torch.from_numpy(np.column_stack([classes, images]).astype(np.int64))


def _shift(images: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Images [n, 64] moved by up to a pixel in both directions; what comes in is black."""
    wide = np.pad(images.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    rows, columns = (np.arange(8)[None] + 1 + by[:, i : i + 1] for i in range(2))
    return wide[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]].reshape(-1, 64)


def _crops(maps: np.ndarray, draw: np.random.Generator, rows: int, raster: Raster) -> tuple[np.ndarray, np.ndarray]:
    """Random 32 x 32 crops of code maps [3, h, w] (the code of the patch that begins at every pixel): tokens, class tokens."""
    kind = draw.integers(len(maps), size=rows)
    span = PATCH * np.arange(8)
    top, left = (draw.integers(size - span[-1], size=rows) for size in maps.shape[1:])
    tokens = maps[kind[:, None, None], (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]]
    return tokens.reshape(rows, 64), np.asarray([raster.classes[TEXTURES[k]] for k in kind])


def load(kind: Kind) -> Images:
    """The images of a kind. Ends with the command to install what is missing."""
    try:
        return digits() if kind == "digits" else textures()
    except ImportError as error:
        raise SystemExit(f"{error.name} is missing: pip install scikit-learn scikit-image") from None


def digits() -> Images:
    """1,797 handwritten digits of 8 x 8 pixels and 17 grey levels (UCI): tokens 0 .. 16, classes 17 .. 26, no class 27."""
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = np.round(np.arange(17) * 255 / 16).astype(np.uint8).reshape(17, 1, 1)
    raster = Raster(8, 8, grey, {str(i): 17 + i for i in range(10)}, 27, 1.5)
    order = np.random.default_rng(0).permutation(len(data.target))
    tokens, classes = data.images.reshape(-1, 64).astype(np.int64)[order], 17 + data.target[order]
    cut = len(order) - HELD_OUT_DIGITS
    return Images("digits", raster, 32, tokens[:cut], classes[:cut], tokens[cut:], classes[cut:])


def textures() -> Images:
    """Three 512 x 512 textures as codes of 4 x 4 patches (k-means, 256 codes): a codebook without a network.

    The right quarter of each picture is held out; crops of the two parts share no pixel.
    """
    from skimage import data as pictures
    from sklearn.cluster import MiniBatchKMeans

    whole = np.stack([getattr(pictures, name)() for name in TEXTURES])
    parts = whole[:, :, :384], whole[:, :, 384:]
    patches = [np.lib.stride_tricks.sliding_window_view(p, (PATCH, PATCH), axis=(1, 2)) for p in parts]
    flat = [p.reshape(-1, PATCH * PATCH).astype(np.float32) for p in patches]
    some = flat[0][np.random.default_rng(0).permutation(len(flat[0]))[:60_000]]
    means = MiniBatchKMeans(CODES, random_state=0, n_init=1, batch_size=4096, max_iter=60).fit(some)
    book = np.clip(np.round(means.cluster_centers_), 0, 255).astype(np.uint8)
    book = book[np.argsort(book.mean(1))]
    maps = [_nearest(f, book).reshape(p.shape[:3]) for f, p in zip(flat, patches, strict=True)]
    error = np.mean((book[maps[1].reshape(-1)].astype(float) - flat[1]) ** 2)
    classes = {name: CODES + i for i, name in enumerate(TEXTURES)}
    raster = Raster(8, 8, book.reshape(CODES, PATCH, PATCH), classes, CODES + len(TEXTURES), 1.5)
    (seen, seen_class), (held, held_class) = (
        _crops(m, np.random.default_rng(1 + i), n, raster)
        for i, (m, n) in enumerate(zip(maps, (1500, 297), strict=True))
    )
    told = f"reconstruction of held-out pixels: PSNR {10 * np.log10(255**2 / error):.1f} dB"
    return Images("textures", raster, 272, seen, seen_class, held, held_class, maps[0], told)


def _nearest(points: np.ndarray, book: np.ndarray) -> np.ndarray:
    """The nearest code of each point, in parts that fit into memory."""
    codes = book.astype(np.float32)
    half = (codes**2).sum(1) / 2
    return np.concatenate([(half - part @ codes.T).argmin(1) for part in np.array_split(points, 32)])
