"""Pictures from files, bytes and data URLs, for models that read images. What comes from outside is bounded before it is decoded.

Needs Pillow: `pip install "outrider[images]"`. Nothing is ever fetched.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError, RequestError

MAX_BYTES = 20 << 20
"""Largest file of a picture."""
MAX_PIXELS = 40_000_000
"""Most pixels of a picture: those of a telephone's camera are 12 to 50 million."""
TOTAL_PIXELS = 80_000_000
"""Most pixels of all pictures of one prompt."""
MOST = 32
"""Most pictures of a prompt."""
MAX_RATIO = 100
"""Longest side, in multiples of the shortest."""
MAX_PARTS = 1 << 18
"""Most chunks, segments or blocks of a file, which Pillow reads one by one: one of 20 MiB has 82,000 of GIF's."""
MAX_SCANS = 100
"""Most passes over a progressive JPEG, each over all its pixels: encoders make ten."""
MAX_NOTES = 1 << 17
"""Most bytes of notes of a camera (EXIF): their entries may overlap, and older releases of Pillow copy each."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
"""Modes with 8 bits a channel or less; deeper ones would be cut off in silence."""
_WHY = {
    "UnidentifiedImageError": "is no PNG, JPEG, WebP or GIF file",
    "DecompressionBombError": f"has more than the {MAX_PIXELS} pixels that are read",
}
"""Error of Pillow -> what is said of the file."""
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
"""The next marker of a JPEG; in its compressed data 0 or a restart follows 0xff."""
_DATA_URL = re.compile(r"data:image/(?:png|jpe?g|webp|gif)(?:;[\w=.+-]{1,64}){0,4};base64,", re.IGNORECASE)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError('images need Pillow: pip install "outrider[images]"') from None
    return Image


def bytes_of_url(url: str, name: str = "the image") -> bytes:
    """The bytes in a data URL. Raises RequestError for any other URL: no address is ever read."""
    head = _DATA_URL.match(url)
    if head is None:
        raise RequestError(
            f"{name} must be a data URL (data:image/png;base64,...) of a PNG, JPEG, WebP or GIF file, and is {url[:24]!r}...: "
            "addresses are never fetched, send the file itself"
        )
    body = url[head.end() :]
    if len(body) * 3 // 4 - body.count("=", -2) > MAX_BYTES:
        raise RequestError(_too_large(name))
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{name} is not base64 behind its comma: encode the file's bytes again") from None


def as_picture(thing: Any, name: str = "the image") -> Any:
    """A picture of Pillow in RGB: from one, from a path, or from the bytes of a file. Raises RequestError for what is none."""
    image = _pillow()
    if isinstance(thing, str | Path):
        thing = _bytes_at(Path(thing).expanduser(), name)
    if isinstance(thing, bytes | bytearray | memoryview):
        return _decoded(image, bytes(thing), name)
    if not isinstance(thing, image.Image):
        raise RequestError(
            f"{name} is {type(thing).__name__}: give a picture of Pillow, a path, or the bytes of a file"
        )
    width, height = thing.size
    _check_size(width, height, name)
    return _in_rgb(thing, name)


def as_pictures(things: Sequence[Any]) -> list[Any]:
    """The pictures of a prompt, as by `as_picture`, and not too many together."""
    if len(things) > MOST:
        raise RequestError(f"there are {len(things)} images, and a prompt has at most {MOST}: send fewer")
    out, pixels = list[Any](), 0
    for number, thing in enumerate(things, 1):
        out.append(as_picture(thing, f"image {number}"))
        pixels += out[-1].width * out[-1].height
        if pixels > TOTAL_PIXELS:
            raise RequestError(
                f"the images have more than {TOTAL_PIXELS} pixels together: make them smaller, or send fewer"
            )
    return out


def trial_picture() -> Any:
    """A small picture that is the same every time."""
    return _pillow().linear_gradient("L").resize((64, 48)).convert("RGB")


def _bytes_at(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:  # a file may grow, and a device has no size: no more than this is read
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise RequestError(_too_large(f"{name} ({path})"))
        return data
    except OSError as error:
        raise RequestError(
            f"{name} ({path}) cannot be read ({error.strerror or type(error).__name__}): check the path"
        ) from None


def _decoded(image: Any, data: bytes, name: str) -> Any:
    """A picture from the bytes of a file: format, size and number of frames are known before a pixel is decoded."""
    if len(data) > MAX_BYTES:
        raise RequestError(_too_large(name))
    check_parts(data, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # our own limit on pixels is below; damaged notes would give one for each entry
        try:
            found = image.open(io.BytesIO(data), formats=FORMATS)
            width, height = found.size
            _check_size(width, height, name)
            # of several pictures of one camera (MPO) the first one is meant; all frames are not counted, there may be millions
            if found.format != "MPO" and getattr(found, "is_animated", False):
                raise RequestError(f"{name} is animated: send one frame")
            found.load()
            _check_notes(max(len(found.info.get(key, "")) for key in ("exif", "Raw profile type exif")), name)
        except RequestError:
            raise
        except Exception as error:  # damaged files end in errors of many libraries
            why = _WHY.get(type(error).__name__, "is damaged and cannot be decoded")
            raise RequestError(f"{name} {why}: send another file") from None
        return _in_rgb(found, name)


def _in_rgb(found: Any, name: str) -> Any:
    """Turned as its camera was held, in RGB: as transformers loads pictures."""
    from PIL import ImageOps

    if found.mode not in MODES:
        raise RequestError(f"{name} has pixels of mode {found.mode}: convert it to 8 bits a channel (RGB)")
    try:
        return ImageOps.exif_transpose(found).convert("RGB")
    except Exception:  # damaged notes about the camera
        return found.convert("RGB")


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise RequestError(
            f"{name} has {width} x {height} pixels, and at most {MAX_PIXELS} in all are read: make it smaller"
        )
    if min(width, height) < 1 or max(width, height) > MAX_RATIO * min(width, height):
        raise RequestError(
            f"{name} has {width} x {height} pixels: no side may be more than {MAX_RATIO} times the other"
        )


def _check_notes(size: int, name: str) -> None:
    if size > MAX_NOTES:
        raise RequestError(
            f"{name} has more than {MAX_NOTES >> 10} KiB of its camera's notes (EXIF): save it without them"
        )


def check_parts(data: bytes, name: str) -> None:
    """Refuse a file whose parts would take minutes to read, in a loop of Pillow or in passes over all pixels."""
    if data.startswith(b"\x89PNG"):
        many = parts_of_png(data) > MAX_PARTS
    elif data.startswith(b"GIF8"):
        many = parts_of_gif(data) > MAX_PARTS
    elif data.startswith(b"\xff\xd8"):
        parts, scans, notes = parts_of_jpeg(data)
        _check_notes(notes, name)
        many = parts > MAX_PARTS or scans > MAX_SCANS
    else:
        return
    if many:
        raise RequestError(f"{name} is a file of far too many parts: save it again with an ordinary program")


def parts_of_png(data: bytes) -> int:
    """Chunks, or more than may be."""
    at, parts = 8, 0
    while at + 8 <= len(data) and parts <= MAX_PARTS:
        at += 12 + int.from_bytes(data[at : at + 4])
        parts += 1
    return parts


def parts_of_jpeg(data: bytes) -> tuple[int, int, int]:
    """Segments, with bytes outside of them before the first scan; scans; bytes of the camera's notes. Or more than may be."""
    at, parts, scans, notes = 2, 0, 0, 0
    while parts <= MAX_PARTS and scans <= MAX_SCANS and (found := _MARKER.search(data, at)) is not None:
        kind, end = found[1][0], found.end()
        if kind == 0xD9:  # the end of the picture
            break
        parts += 1 + (0 if scans else found.start() - at)
        scans += kind == 0xDA
        size = 0 if kind in (0x01, 0xD8) else int.from_bytes(data[end : end + 2])
        notes += size if kind == 0xE1 and data[end + 2 : end + 6] == b"Exif" else 0
        at = end + size
    return parts, scans, notes


def parts_of_gif(data: bytes) -> int:
    """Blocks up to the second picture's, or more than may be."""
    table = lambda flags: 3 << ((flags & 7) + 1) if flags & 0x80 else 0  # noqa: E731
    at, parts, frames = 13 + table(data[10] if len(data) > 10 else 0), 0, 0
    while at < len(data) and parts <= MAX_PARTS and frames < 2:
        kind = data[at]
        parts += 1
        if kind == 0x3B:  # the end
            break
        if kind == 0x2C:
            frames += 1
            at += 11 + table(data[at + 9] if at + 9 < len(data) else 0)
        else:
            at += 2 if kind == 0x21 else 1
        while kind in (0x21, 0x2C) and at < len(data) and parts <= MAX_PARTS:
            size = data[at]
            at, parts = at + 1 + size, parts + 1
            if not size:
                break
    return parts


def _too_large(name: str) -> str:
    return f"{name} is larger than {MAX_BYTES >> 20} MiB: make it smaller"
