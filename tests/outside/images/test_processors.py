"""Checkpoint folders whose processors need torchvision: what AutoProcessor makes of them, against transformers' own generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.pixtral import PixtralImageProcessor, PixtralProcessor
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from benchmarks.model_sizes import shrink
from outrider.build import Engine
from outrider.models.admit import model_class
from outrider.params import SamplingParams
from tests.checkpoints_images import Small, byte_tokenizer, picture, small

NEW = 12


def qwen() -> Small:
    kit = small("qwen2_5_vl")
    pixels = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 12)
    return Small(kit.model, Qwen2_5_VLProcessor(pixels, kit.processor.tokenizer, Qwen2VLVideoProcessor()), kit.mark)


def mistral() -> Small:
    marks = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = byte_tokenizer("llava", marks)
    tokenizer.chat_template = None
    pixels = PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    processor = PixtralProcessor(pixels, tokenizer, patch_size=8, spatial_merge_size=2)
    config = shrink(AutoConfig.for_model("mistral3"), {})
    config.image_token_id = tokenizer.convert_tokens_to_ids("[IMG]")
    config.get_text_config().max_position_embeddings = 1024
    config.vision_config.image_size, config.vision_config.patch_size, config.vision_config.num_hidden_layers = 64, 8, 2
    torch.manual_seed(0)
    model = model_class(config).from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.04 * torch.randn_like(p)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return Small(model, processor, "[IMG]")


@pytest.mark.parametrize("make", [qwen, mistral])
def test_a_folder_is_read_by_its_own_processor(make: Any, tmp_path: Path) -> None:
    kit = make()
    kit.model.save_pretrained(tmp_path)
    kit.processor.save_pretrained(tmp_path)
    asked = [
        (f"hello {kit.mark} what is it?", [picture(1)]),
        (f"{kit.mark} and {kit.mark} both", [picture(2, 40, 40), picture(3, 90, 50)]),
    ]
    expected = [kit.text(text, images, NEW) for text, images in asked]
    assert expected[0] != kit.text(asked[0][0], [picture(9)], NEW)
    for draft, length in (("none", 0), ("ngram", 3)):
        engine = Engine.build(
            target=str(tmp_path), draft=draft, length=length, slots=2, max_length=400, dtype="float32"
        )
        prompts = [engine.images.read(text, images) for text, images in asked]
        found = engine.generate(prompts, SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True))
        assert [list(result.outputs[0].token_ids) for result in found] == expected
