"""Pictures from outside: what is too large, damaged, of another kind or at an address is refused in one sentence, before it is
decoded where that can be known."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from outrider import pictures
from outrider.errors import ConfigError, RequestError
from outrider.pictures import as_picture, as_pictures, bytes_of_url
from tests.checkpoints_images import picture


def file_of(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def url_of(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_pictures_of_every_format_and_mode_become_rgb(kind: str, tmp_path: Path) -> None:
    made = picture(1)
    data = file_of(made, kind)
    found = as_picture(bytes_of_url(url_of(data, kind.lower())))
    assert found.mode == "RGB" and found.size == made.size
    if kind == "PNG":
        assert np.array_equal(np.asarray(found), np.asarray(made))
        (tmp_path / "a.png").write_bytes(data)
        assert np.array_equal(np.asarray(as_picture(tmp_path / "a.png")), np.asarray(made))
        for mode in ("1", "L", "LA", "P", "RGBA"):
            assert as_picture(file_of(made.convert(mode))).mode == "RGB"


def test_a_picture_is_turned_as_its_camera_was_held() -> None:
    made = picture(1)
    notes = made.getexif()
    notes[0x0112] = 6
    assert as_picture(file_of(made, "JPEG", exif=notes)).size == made.size[::-1]


def bomb(width: int, height: int) -> bytes:
    """The beginning of a PNG file that says it has so many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))  # noqa: E731
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


def deep() -> bytes:
    return file_of(Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)))


BAD = {
    "nothing": (b"", "no PNG"),
    "text": (b"hello, this is no picture", "no PNG"),
    "another format": (file_of(picture(1), "BMP"), "no PNG"),
    "cut off": (file_of(picture(1))[:400], "damaged"),
    "bomb": (bomb(60_000, 60_000), "pixels"),
    "wide": (bomb(30_000, 1), "no side"),
    "empty pixels": (bomb(300, 300), "damaged"),
    "16 bits": (deep(), "mode I"),
    "moving": (file_of(picture(1), "GIF", save_all=True, append_images=[picture(2)]), "animated"),
    "a number": (7, "is int"),
    "no file": ("/nowhere/a.png", "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_are_refused(name: str) -> None:
    given, why = BAD[name]
    with pytest.raises(RequestError, match=why):
        as_picture(given)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://127.0.0.1/a.png", "never fetched"),
        ("https://example.org/a.png", "never fetched"),
        ("file:///etc/passwd", "never fetched"),
        ("data:text/html;base64,AAAA", "must be a data URL"),
        ("data:image/svg+xml;base64,AAAA", "must be a data URL"),
        ("data:image/png,AAAA", "must be a data URL"),
        ("data:image/png;base64,****", "not base64"),
        ("data:image/png;base64,AAA", "not base64"),
        ("", "must be a data URL"),
    ],
)
def test_other_urls_are_refused(url: str, why: str) -> None:
    with pytest.raises(RequestError, match=why):
        bytes_of_url(url)


def test_too_much_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = file_of(picture(1))
    monkeypatch.setattr(pictures, "TOTAL_PIXELS", 3 * 60 * 90)
    assert len(as_pictures([data] * 3)) == 3
    with pytest.raises(RequestError, match="together"):
        as_pictures([data] * 4)
    monkeypatch.setattr(pictures, "MAX_BYTES", len(data) - 1)
    with pytest.raises(RequestError, match="is larger than"):
        as_picture(Path("/dev/zero"))  # a device says that it has no bytes, and has them for ever
    (tmp_path / "a.png").write_bytes(data)
    for call in (lambda: as_picture(data), lambda: bytes_of_url(url_of(data)), lambda: as_picture(tmp_path / "a.png")):
        with pytest.raises(RequestError, match="larger than"):
            call()


def test_the_largest_file_is_read_whatever_its_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (30, 31, 32):
        monkeypatch.setattr(pictures, "MAX_BYTES", size)
        assert bytes_of_url(url_of(b"a" * size)) == b"a" * size
        with pytest.raises(RequestError, match="larger than"):
            bytes_of_url(url_of(b"a" * (size + 1)))


def test_without_pillow_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r'pip install "outrider\[images\]"'):
        as_picture(b"")
