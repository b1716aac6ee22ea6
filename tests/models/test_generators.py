"""Models of transformers that write images: their own generation is the oracle, on small random checkpoints."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import JanusForConditionalGeneration

from outrider.cli import main
from outrider.errors import ConfigError, RequestError
from outrider.evaluate.images import Painter, load_painter
from outrider.models.config import read_raw_config
from outrider.models.counts import check_counts
from outrider.models.framed import NEVER
from outrider.models.hf.generators import CLIP, kind_of, load_generator, pixels
from outrider.models.hf.target import HFTarget
from tests.checkpoints_generators import CODES, SIDE, emu3_written, generator, tokenizer_of

WORDS = "a red boat"


@pytest.fixture(scope="module", params=["janus", "emu3"])
def folder(request, tmp_path_factory) -> Path:
    return generator(request.param, tmp_path_factory.mktemp(request.param))


def size_of(folder: Path) -> tuple[int, int] | None:
    """Emu3 writes any size: another height than width shows which is which."""
    return (3, 5) if "emu3" in folder.name else None


def painter_of(folder: Path, draft: str = "none", **options: Any) -> Painter:
    options = {"dtype": "float32"} | options
    return load_painter(folder, draft, length=4 if draft != "none" else 0, size=size_of(folder), **options)


def own_codes(folder: Path, **guidance: Any) -> tuple[list[int], Any]:
    """Transformers' own greedy image of `WORDS`, and the model. guidance: of Emu3."""
    ids = load_generator(folder, torch.float32, size_of(folder)).prompt(WORDS)
    if "janus" in folder.name:
        model: Any = JanusForConditionalGeneration.from_pretrained(folder)
        inputs = torch.tensor([[i - CODES for i in ids]])
        model.generation_config.generation_kwargs = {"boi_token_id": int(inputs[0, -1])}
        try:
            made = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), generation_mode="image", do_sample=False
            )
        except TypeError as error:  # transformers 5.16 forgets an argument of its own function
            pytest.skip(f"this release of transformers cannot draw with Janus: {error}")
        return made[0].tolist(), model
    made, model = emu3_written(folder, ids, (3, 5), **guidance)
    return made.sequences[0, len(ids) :].tolist(), model


def test_a_description_goes_through_the_models_chat_template(folder: Path, tmp_path: Path) -> None:
    """Also one that reads typed parts alone, as Janus' does."""
    place = Path(shutil.copytree(folder, tmp_path / folder.name))
    tokenizer = tokenizer_of("janus" if "janus" in folder.name else "emu3")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    tokenizer.save_pretrained(place)
    tokens = load_generator(place, torch.float32, size_of(folder)).prompt(WORDS)
    text = [t - CODES for t in tokens] if "janus" in folder.name else tokens
    assert str(tokenizer.decode(text)).startswith(f"<user>{WORDS}")


def test_its_pixels_are_those_of_the_models_own_decoder(folder: Path) -> None:
    wanted, model = own_codes(folder)
    (drawing,) = painter_of(folder).draw([(WORDS, 1)], temperature=0.0)
    if "janus" in folder.name:
        made = model.decode_image_tokens(torch.tensor([wanted]))[0]
    else:
        padded = torch.tensor([[*wanted, 0, 0, 0]])
        made = model.decode_image_tokens(image_tokens=padded, height=3, width=5)[0].permute(1, 2, 0)
    pixels = ((made.detach() * 0.3 + 0.4) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    assert np.array_equal(drawing.picture(), pixels)
    assert pixels.std() > 1
    assert drawing.coloured().shape == pixels.shape


def test_nothing_but_codes_can_be_drawn_and_rows_end_where_they_must(folder: Path) -> None:
    painter = painter_of(folder, slots=2)
    frame = painter.raster.frame  # type: ignore[attr-defined]
    for drawing in painter.draw([(WORDS, i) for i in range(4)], temperature=5.0):
        codes = frame.codes_of(drawing.tokens)
        assert bool(frame.codes[codes].all())
        assert len(codes) == frame.height * frame.width
        assert [t for t in drawing.tokens if not frame.codes[t]] == [frame.row_end] * (len(drawing.tokens) - len(codes))


def test_rules_of_nearness_know_the_codebook_as_the_model_decodes_it(folder: Path) -> None:
    made = load_generator(folder, torch.float32, size_of(folder))
    codes = np.flatnonzero(made.frame.codes.numpy())
    assert np.array_equal(np.flatnonzero(~np.isnan(made.points).any(-1)), codes)  # marks and texts have no place
    gaps = np.linalg.norm(made.points[codes, None] - made.points[codes], axis=-1)
    assert 0.1 < gaps.max() <= 1.0
    whole = HFTarget.load(folder, dtype=torch.float32, pictured=True).model.model
    if "janus" in folder.name:
        book = torch.nn.functional.normalize(whole.vqmodel.quantize.embedding.weight, dim=-1)
    else:  # which code a token is, transformers says
        book = whole.vqmodel.quantize.embedding.weight[
            whole.vocabulary_mapping.convert_bpe2img(torch.tensor([[*codes, 0]]))[0]
        ]
    own = torch.cdist(book, book).detach().numpy()
    assert np.allclose(gaps, own * (gaps.max() / own.max()), atol=1e-6)


def test_what_it_cannot_do_is_said_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="say what to draw"):
        painter_of(folder).draw([(None, 0)])
    if "janus" in folder.name:
        with pytest.raises(ConfigError, match="text without condition of its own: leave out the negative"):
            painter_of(folder, negative="blurry")
        with pytest.raises(ConfigError, match="4 x 4 codes only"):
            load_painter(folder, "none", length=0, size=(8, 8))
    else:
        with pytest.raises(ConfigError, match="mark behind which an image begins"):
            painter_of(folder).draw([("a <|image token|> here", 0)])
        with pytest.raises(ConfigError, match="scale is 1 here: set it"):
            painter_of(folder, negative="blurry")
        with pytest.raises(ConfigError, match="use at most 1024"):
            painter_of(folder, guidance=2.0, negative="blurry" * 300)
        with pytest.raises(ConfigError, match="shorten the negative prompt"):
            painter_of(folder, guidance=2.0, negative="blurry" * 60)
        with pytest.raises(ConfigError, match="does not fit"):
            load_painter(folder, "none", length=0, size=(40, 40))
        painter = painter_of(folder)
        for _ in range(2):  # also in a slot in which an image has begun before
            with pytest.raises(RequestError, match="no image begins"):
                painter.engine.generate([[1, 2, 3]])
            painter.draw([(WORDS, 1)])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_std": [0.5, "half"]}))
    with pytest.raises(ConfigError, match="image_std must be a number or three"):
        pixels(tmp_path, CLIP, torch.zeros(2, 2, 3))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chameleon"}))
    with pytest.raises(ConfigError, match="no model that writes images: it needs a raster.json .*emu3, janus"):
        load_generator(tmp_path)


def test_a_configuration_that_holds_a_vocabulary_is_read(tmp_path: Path) -> None:
    """Emu3's has all 184,622 tokens, some of them words for counts of parts."""
    tokens = [*(f"token{i}" for i in range(151_854)), *(f"<|visual token {i:06d}|>" for i in range(32_768))]
    raw = {"model_type": "emu3", "vocabulary_map": {token: i for i, token in enumerate(tokens)} | {"heads": 35_810}}
    (tmp_path / "config.json").write_text(json.dumps(raw, indent=2))
    assert kind_of(tmp_path) == "emu3"
    assert read_raw_config(tmp_path) == raw
    check_counts(tmp_path, raw)


def test_the_command_draws_them_and_names_the_option_that_is_missing(
    folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["outrider", "image", "--target", str(folder), *words])
        try:
            main.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    size = size_of(folder) or (SIDE, SIDE)
    given = () if size_of(folder) is None else ("--size", f"{size[0]}x{size[1]}")
    out = tmp_path / "out.png"
    assert run("--prompt", WORDS, "--draft", "jacobi:4", "--count", "2", "--colour", "--out", str(out), *given) == 0
    picture = np.asarray(Image.open(out))
    side = painter_of(folder).raster.side
    assert picture.shape == (size[0] * side, 2 * size[1] * side + 1, 3)
    assert run("--out", str(out), *given) == 2
    assert "--prompt" in capsys.readouterr().err
    guided = ("--prompt", WORDS, "--guidance", "3", "--negative-prompt", "blurry", "--count", "1", "--out", str(out))
    assert run(*guided, *given) == (2 if "janus" in folder.name else 0)
    assert ("leave out the negative prompt" in capsys.readouterr().err) == ("janus" in folder.name)
    assert run("--prompt", WORDS, "--size", "4y4") == 2
    assert "such as 32x32" in capsys.readouterr().err


def test_a_mask_leaves_differences_of_logits_numbers() -> None:
    both = torch.full((2,), NEVER)
    assert torch.isfinite(torch.lerp(both, both, 5.0)).all()
