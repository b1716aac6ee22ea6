"""Pictures as PNG files and as blocks for terminals. No library: a PNG is its rows, compressed (RFC 2083)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from outrider.errors import ConfigError

Picture = npt.NDArray[np.uint8]
MOST = 1 << 26
"""Most pixels of a picture."""


def check_size(shape: tuple[int, ...]) -> None:
    """ConfigError unless `png` writes a picture of this shape."""
    if len(shape) not in (2, 3) or 0 in shape or shape[0] * shape[1] > MOST:
        raise ConfigError(f"a picture of {' x '.join(map(str, shape))} cannot be written: choose a smaller scale")


def png(picture: Picture) -> bytes:
    """The file of a picture [h, w] of greys or [h, w, 3] of colours. ConfigError for one that is empty or absurdly large."""
    check_size(picture.shape)
    height, width = picture.shape[:2]
    rows = np.ascontiguousarray(picture, dtype=np.uint8).reshape(height, -1)
    flat = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()  # each row begins with "no filter"
    head = struct.pack(">IIBBBBB", width, height, 8, 0 if picture.ndim == 2 else 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(flat, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def grid(pictures: Sequence[Picture], columns: int, gap: int = 1, back: int = 128) -> Picture:
    """Pictures of one size side by side, `columns` in a row, `gap` pixels of grey `back` between them."""
    height, width = pictures[0].shape[:2]
    size = (*grid_size((height, width), len(pictures), columns, gap), *pictures[0].shape[2:])
    out = np.full(size, back, dtype=np.uint8)
    for n, picture in enumerate(pictures):
        top, left = (n // columns) * (height + gap), (n % columns) * (width + gap)
        out[top : top + height, left : left + width] = picture
    return out


def grid_size(size: tuple[int, int], count: int, columns: int, gap: int = 1) -> tuple[int, int]:
    """Height and width of the `grid` of `count` pictures of a size."""
    return -(-count // columns) * (size[0] + gap) - gap, columns * (size[1] + gap) - gap


def enlarged(picture: Picture, scale: int) -> Picture:
    """Every pixel as a square of `scale` x `scale`."""
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


def blocks(picture: Picture) -> list[str]:
    """Lines of half blocks in 24-bit colour (ANSI), two rows of the picture a line."""
    rgb = picture if picture.ndim == 3 else np.repeat(picture[:, :, None], 3, axis=2)
    if len(rgb) % 2:
        rgb = np.concatenate([rgb, rgb[-1:]])
    cell = lambda up, low: f"\x1b[38;2;{up[0]};{up[1]};{up[2]};48;2;{low[0]};{low[1]};{low[2]}m▀"  # noqa: E731
    return [
        "".join(cell(u, d) for u, d in zip(rgb[y], rgb[y + 1], strict=True)) + "\x1b[0m" for y in range(0, len(rgb), 2)
    ]
