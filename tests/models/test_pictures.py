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


def chunk(name: bytes, data: bytes) -> bytes:
    """Of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


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


def notes_of(entries: int, size: int) -> bytes:
    """A camera's notes whose entries all lie at the same place, which is told `entries` times."""
    entry = [struct.pack("<HHII", 0x9000 + i, 2, size, 14 + 12 * entries) for i in range(entries)]
    return b"II*\0" + struct.pack("<IH", 8, entries) + b"".join(entry) + bytes(4) + b"A" * size


def in_parts(kind: str) -> bytes:
    """A small picture in a file that takes Pillow long: half a million parts, or notes, or passes over its pixels."""
    many, made = 500_000, picture(1)
    png, jpeg, gif = (file_of(made, k, progressive=True) for k in ("PNG", "JPEG", "GIF"))
    last = jpeg.rfind(b"\xff\xda")
    where = gif.index(b",", 13 + 3 * 256)
    return {
        "png chunks": png[:33] + chunk(b"teSt", b"") * many + png[33:],
        "png notes": png[:33] + chunk(b"eXIf", notes_of(9000, 1 << 20)) + png[33:],
        "webp notes": file_of(made, "WEBP", exif=b"Exif\0\0" + notes_of(9000, 1 << 20)),
        "jpeg segments": jpeg[:2] + b"\xff\xfe\0\2" * many + jpeg[2:],
        "jpeg padding": jpeg[:2] + b"\xff" * many + jpeg[2:],
        "jpeg notes": jpeg[:2] + (b"\xff\xe1\xff\xf8Exif\0\0" + bytes(0xFFF0)) * 3 + jpeg[2:],
        "jpeg scans": jpeg[:-2] + jpeg[last:-2] * 100 + jpeg[-2:],
        "jpeg scans behind a hidden end": jpeg[:-2] + b"\xff\xfe\0\4\xff\xd9" + jpeg[last:-2] * 100 + jpeg[-2:],
        "gif comments": gif[:where] + b"!\xfe\1a\0" * many + gif[where:],
        "gif comments behind": gif[:-1] + b"!\xfe\1a\0" * many + gif[-1:],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["png chunks", "png notes", "webp notes", "jpeg segments", "jpeg padding", "jpeg notes", "jpeg scans",
     "jpeg scans behind a hidden end", "gif comments", "gif comments behind"],
)  # fmt: skip
def test_small_pictures_that_take_long_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it can be known before Pillow opens the file."""
    data = in_parts(kind)
    if kind not in ("png notes", "webp notes"):  # whose notes Pillow finds, and does not read by itself
        monkeypatch.setattr(Image, "open", lambda *given, **how: pytest.fail("it was opened"))
    why = "128 KiB of its camera's notes" if "notes" in kind else "far too many parts: save it again"
    with pytest.raises(RequestError, match=why):
        as_picture(data)


def test_ordinary_files_are_far_from_such_bounds() -> None:
    rough = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8))
    png, gif = file_of(rough), file_of(rough, "GIF")
    assert pictures.parts_of_png(png) < 200
    assert abs(pictures.parts_of_gif(gif) - len(gif) // 255) < 200
    assert pictures.MAX_BYTES // 255 < pictures.MAX_PARTS // 2
    notes = picture(1).getexif()
    notes[0x0112], notes[0x010F] = 8, "a camera" * 1000
    for more in ({}, {"progressive": True}, {"exif": notes}, {"icc_profile": bytes(300_000), "comment": "a" * 60_000}):
        parts, scans, size = pictures.parts_of_jpeg(file_of(rough, "JPEG", **more))
        assert parts < 60 and 1 <= scans <= 12
        assert (size > 8000) == ("exif" in more)


def test_a_file_without_its_end_is_measured_too() -> None:
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        data = file_of(picture(1), kind)
        for size in range(0, len(data), max(1, len(data) // 150)):
            pictures.check_parts(data[:size], "it")


def test_the_first_of_a_cameras_pictures_is_read_and_an_animation_is_refused_at_its_second_frame() -> None:
    first, other = picture(1), picture(2)
    several = file_of(first, "MPO", save_all=True, append_images=[other])
    assert Image.open(io.BytesIO(several)).n_frames == 2
    assert np.array_equal(np.asarray(as_picture(several)), np.asarray(as_picture(file_of(first, "JPEG"))))
    for kind in ("GIF", "PNG", "WEBP"):
        with pytest.raises(RequestError, match="animated"):
            as_picture(file_of(first, kind, save_all=True, append_images=[other]))
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    frames = (b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2D\1\0") * 1_000_000
    with pytest.raises(RequestError, match="animated"):
        as_picture(head + frames + b";")


def test_damaged_notes_say_nothing(recwarn: pytest.WarningsRecorder) -> None:
    """Pillow warns of every entry, which would fill a server's log, and its memory."""
    made = file_of(picture(1), exif=notes_of(3000, 1000)[:40_000])
    assert as_picture(made).size == picture(1).size
    assert not recwarn.list
