"""`outrider image` on the shipped digits: the same pictures however they are drafted, the file, and what is refused."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from outrider.assets import shipped_images
from outrider.cli import main
from outrider.errors import ConfigError
from outrider.evaluate.images import load_painter
from outrider.evaluate.png import blocks, enlarged, grid, grid_size, png
from outrider.raster import Raster, read_raster
from tests.compilers import needs_compiler

WANTED = [("7", 3), ("0", 4), (None, 5)]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["outrider", "image", *words])
    try:
        main.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def decoded(data: bytes) -> np.ndarray:
    """A PNG of ours, read back by the format's own words: chunks with checksums, rows without filters."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, body, size = 8, b"", (0, 0, 0)
    while at < len(data):
        (length,), name = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        chunk = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(name + chunk)
        if name == b"IHDR":
            width, height, depth, kind = struct.unpack(">IIBB", chunk[:10])
            assert depth == 8
            size = (height, width, {0: 1, 2: 3}[kind])
        body += chunk if name == b"IDAT" else b""
        at += 12 + length
    rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(size[0], -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(size) if size[2] == 3 else rows[:, 1:]


def test_a_png_is_the_picture() -> None:
    rng = np.random.default_rng(0)
    for shape in ((3, 5), (4, 2, 3)):
        picture = rng.integers(0, 256, size=shape, dtype=np.uint8)
        assert np.array_equal(decoded(png(picture)), picture)
    whole = grid([np.full((2, 3), n, np.uint8) for n in (1, 2, 3)], 2, gap=1, back=9)
    assert whole.tolist() == [[1, 1, 1, 9, 2, 2, 2]] * 2 + [[9] * 7] + [[3, 3, 3, 9, 9, 9, 9]] * 2
    assert grid_size((2, 3), 3, 2) == whole.shape
    assert enlarged(np.array([[1, 2]], np.uint8), 2).tolist() == [[1, 1, 2, 2]] * 2
    assert len(blocks(np.zeros((5, 4), np.uint8))) == 3
    with pytest.raises(ConfigError, match="smaller scale"):
        png(np.broadcast_to(np.uint8(0), (1 << 14, 1 << 14)))


@needs_compiler  # elsewhere the last bits depend on how many rows are computed together
@pytest.mark.parametrize("draft", ["auto", "counts", "jacobi:5:up", "eagle", "ngram+jacobi:3"])
def test_with_match_pictures_are_those_of_plain_sampling(draft: str) -> None:
    """Byte for byte, under guidance: what drafts them cannot be seen."""
    plain = load_painter(shipped_images(), "none", length=0, rule="match", slots=1).draw(WANTED)
    painter = load_painter(shipped_images(), draft, length=5, rule="match", slots=3)
    drawn = painter.draw(WANTED)
    assert [d.tokens for d in drawn] == [d.tokens for d in plain]
    assert painter.engine.counts.accepted > 0
    assert painter.engine.defects == 0
    assert {len(d.tokens) for d in drawn} == {64}
    assert max(t for d in drawn for t in d.tokens) < 17


def test_a_picture_that_is_made_of_all_its_tokens_is_not_shown_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn of it; what is shown is the share of tokens that there are. Others are drawn as they grow."""
    from outrider.cli import image, terminal

    told, drawn = list[float](), list[list[list[int]]]()
    monkeypatch.setattr(terminal, "loading", lambda said: contextlib.nullcontext(told.append))
    monkeypatch.setattr(image.Progress, "__call__", lambda self, tokens: drawn.append(tokens))
    raster = Raster(2, 2, np.zeros((3, 2, 2), np.uint8), {"a": 3}, 4, 2.0)
    for whole in (True, False):
        with image.shown(raster, 2, whole=whole) as show:
            show([[1], [1, 2]])
            show([[1, 2, 0, 0], [1, 2, 1, 1]])
    assert told == [3 / 8, 1.0] and drawn == [[[1], [1, 2]], [[1, 2, 0, 0], [1, 2, 1, 1]]]


def test_length_0_draws_plainly_whatever_drafts() -> None:
    painter = load_painter(shipped_images(), "jacobi:5", length=0, slots=1)
    painter.draw(WANTED[:1])
    assert (painter.engine.counts.proposed, painter.engine.counts.steps) == (0, 64)


@pytest.mark.parametrize(("guidance", "temperature"), [(100.0, 1.0), (8.0, 1.0), (1.0, 100.0)])
@pytest.mark.parametrize("draft", ["none", "eagle"])
def test_only_colours_are_drawn_at_any_guidance_and_temperature(
    guidance: float, temperature: float, draft: str
) -> None:
    """The classes and the rest of the vocabulary have no probability, however far logits are apart or close together."""
    painter = load_painter(shipped_images(), draft, guidance=guidance, slots=8)
    drawn = painter.draw([(str(n), n) for n in range(8)], temperature)
    assert {len(d.tokens) for d in drawn} == {64}
    assert max(t for d in drawn for t in d.tokens) < 17


def test_a_model_without_classes_draws_without_one(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "target"
    shutil.copytree(shipped_images(), folder)
    raw = json.loads((folder / "raster.json").read_text())
    (folder / "raster.json").write_text(json.dumps(raw | {"classes": {}}))
    words = ("--target", str(folder), "--count", "2", "--draft", "none", "--scale", "1")
    assert run(monkeypatch, *words, "--out", str(tmp_path / "x.png")) == 0
    assert decoded((tmp_path / "x.png").read_bytes()).shape == (8, 17)


def test_a_grid_that_is_too_large_is_refused_before_it_is_made(tmp_path: Path, monkeypatch, capsys) -> None:
    """A patch of a thousand pixels makes a white grid of many gigabytes: only its size is needed."""
    folder = tmp_path / "target"
    shutil.copytree(shipped_images(), folder)
    raw = json.loads((folder / "raster.json").read_text())
    (folder / "raster.json").write_text(json.dumps(raw | {"patch": 1000, "colours": [[0] * 1_000_000]}))
    monkeypatch.setattr(Raster, "pixels", lambda self, tokens: pytest.fail("a picture was made"))
    assert run(monkeypatch, "--target", str(folder), "--draft", "none", "--out", str(tmp_path / "x.png")) == 2
    assert "smaller scale" in capsys.readouterr().err


def test_the_command_writes_a_grid(tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "seven.png"
    words = ("--class", "7", "--out", str(out), "--count", "4", "--scale", "2", "--seed", "1")
    assert run(monkeypatch, *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pictures"], found["tokens"], found["lossless"], found["bias"]) == (4, 256, True, 0.0)
    assert found["tokens_per_pass"] > 1.2
    assert found["ledger"]["agrees"]
    grey = decoded(out.read_bytes())
    assert grey.shape == (2 * 17, 2 * 17)
    assert run(monkeypatch, *words, "--colour") == 0
    assert "4 pictures, 256 tokens in" in capsys.readouterr().out
    assert decoded(out.read_bytes()).shape == (34, 34, 3)
    lossy = ("--rule", "neighbours:delta=0.3,per_token=0.05", "--allow-lossy", "--json")
    assert run(monkeypatch, *words, *lossy) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.0 < found["bias"] <= 0.05 * 256


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--class", "12"), "has no class '12'"),
        (("--draft", "jacobi:9"), "raise the length"),
        (("--draft", "jacobi:3", "--rule", "block"), "use speculative_sampling or match"),
        (("--rule", "neighbours"), "--allow-lossy"),
        (("--scale", "64", "--count", "1024"), "smaller scale"),
    ],
)
def test_what_cannot_be_done_ends_in_a_sentence(tmp_path, monkeypatch, capsys, words, sentence: str) -> None:
    assert run(monkeypatch, "--out", str(tmp_path / "x.png"), *words) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"height": 0}, "height of"),
        ({"height": 4096, "width": 4096}, "more than a million"),
        ({"height": 9}, "they are of different models"),
        ({"patch": 2}, "is not 4 numbers"),
        ({"colours": [[999]]}, "from 0 to 255"),
        ({"colours": []}, "lacks its colours"),
        ({"classes": {"7": "x"}}, "must be a whole number"),
        ({"null": 99}, "they are of different models"),
        ({"guidance": "much"}, "a number from 0 to 100"),
        (None, "cannot be read as JSON"),
    ],
)
def test_damaged_rasters_are_refused(tmp_path, change, sentence: str) -> None:
    folder = tmp_path / "target"
    shutil.copytree(shipped_images(), folder)
    raw = json.loads((folder / "raster.json").read_text())
    (folder / "raster.json").write_text("{" if change is None else json.dumps(raw | change))
    with pytest.raises(ConfigError, match=sentence):
        load_painter(folder, "none", length=0)


def test_a_model_without_a_raster_is_refused() -> None:
    with pytest.raises(ConfigError, match="no image model of ours"):
        load_painter(shipped_images().parent / "draft", "none")


def test_what_is_shipped_is_small() -> None:
    size = sum(p.stat().st_size for p in shipped_images().parent.rglob("*") if p.is_file())
    assert size <= 4_000_000
    assert load_file(shipped_images() / "model.safetensors")


def test_the_python_of_the_page_runs(capsys) -> None:
    page = (Path(__file__).parents[2] / "docs" / "images.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(block, "docs/images.md", "exec"), {})
    assert "(8, 8)" in capsys.readouterr().out


def test_a_raster_draws_what_it_says(tmp_path) -> None:
    colours = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    raster = Raster(2, 2, colours, {"a": 3}, 4, 2.0)
    raster.save(tmp_path)
    again = read_raster(tmp_path)
    assert again.pixels([0, 1, 2]).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 255, 255], [10, 11, 255, 255]]
    assert (again.prompt("a"), again.prompt(None), again.conditions()) == ([3], [4], {3: 4})
    with pytest.raises(ConfigError, match="at most 4 tokens"):
        again.pixels([3])
    assert float(np.linalg.norm(Raster(1, 1, np.array([[[0]], [[255]]], np.uint8), {}, 0).codes()[1])) == 1.0
