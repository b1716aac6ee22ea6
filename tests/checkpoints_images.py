"""Small random models that read images, with processors of transformers' own classes over a tokenizer of bytes.

The models are those of `benchmarks.model_table`, with vision parts of two layers. Nothing of what reads them here is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3 import Gemma3Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3 import Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava import LlavaProcessor
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.model_sizes import OWN, shrink
from outrider.models.admit import model_class

QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
MARKS = {
    **dict.fromkeys(QWENS, "<|vision_start|><|image_pad|><|vision_end|>"), "gemma3": "<boi>", "idefics3": "<image>",
    "llava": "<image>",
}  # fmt: skip
"""What stands in a text for an image."""
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}MARK{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class PilQwenProcessor(Qwen2_5_VLProcessor):
    """The family's processor without videos, whose class needs torchvision."""

    def check_argument_for_proper_class(self, *_: Any) -> None: ...


def picture(number: int, width: int = 60, height: int = 90) -> Image.Image:
    """A picture of noise, another for every number."""
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def byte_tokenizer(family: str, special: list[str], **named: str) -> PreTrainedTokenizerFast:
    """Bytes, and the family's marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<s>", "</s>", *special])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=named
    )
    made.chat_template = TEMPLATE.replace("MARK", MARKS[family])
    return made


def processor_of(family: str) -> tuple[Any, dict[str, Any]]:
    """A family's processor for tiny images, and what the model's configuration has of it."""
    if family in QWENS:
        marks = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]
        made = byte_tokenizer(family, marks)
        ids = dict(zip(("vision_start_token_id", "image_token_id", "video_token_id", "vision_end_token_id"),
                       made.convert_tokens_to_ids(marks), strict=True))  # fmt: skip
        return PilQwenProcessor(Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 12), made), ids
    if family == "gemma3":
        made = byte_tokenizer(
            family, ["<img>", "<boi>", "<eoi>"], image_token="<img>", boi_token="<boi>", eoi_token="<eoi>"
        )
        pixels = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
        own = {"image_token_id": made.convert_tokens_to_ids("<img>"), "mm_tokens_per_image": 4}
        return Gemma3Processor(pixels, made, image_seq_length=4), own
    if family == "idefics3":
        made = byte_tokenizer(family, ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"])
        pixels = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 32})
        own = {"image_token_id": made.convert_tokens_to_ids("<image>"), "scale_factor": 2}
        return Idefics3Processor(pixels, made, image_seq_len=4), own
    made = byte_tokenizer(family, ["<image>"], image_token="<image>")
    own = {"image_token_id": made.convert_tokens_to_ids("<image>")}
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        pixels, made, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ), own


def small_config(family: str, own: dict[str, Any]) -> Any:
    """The configuration of a family's small model. own: of its processor."""
    config = shrink(AutoConfig.for_model(family), OWN.get(family, {}))
    for name, value in own.items():
        setattr(config, name, value)
    config.get_text_config().max_position_embeddings = 1024
    vision = config.vision_config
    if family in QWENS:
        vision.depth, vision.patch_size, vision.out_hidden_size = 2, 14, config.get_text_config().hidden_size
        vision.deepstack_visual_indexes = [0, 1]
    else:
        vision.image_size, vision.patch_size, vision.num_hidden_layers = 32, 8, 2
    if family == "qwen2_vl":
        vision.embed_dim, vision.hidden_size, vision.num_heads = 64, 64, 4
    return config


@dataclass(frozen=True)
class Small:
    """A small model that reads images, and its processor. mark: what stands in a text for an image."""

    model: Any
    processor: Any
    mark: str

    def inputs(self, text: str, images: list[Any]) -> dict[str, torch.Tensor]:
        """A prompt as the processor makes it."""
        return dict(self.processor(text=[text], images=[images], return_tensors="pt"))

    @torch.no_grad()
    def text(self, text: str, images: list[Any], tokens: int) -> list[int]:
        """Transformers' own greedy text."""
        given = self.inputs(text, images)
        out = self.model.generate(**given, max_new_tokens=tokens, do_sample=False)
        return out[0, given["input_ids"].shape[1] :].tolist()

    @torch.no_grad()
    def logits(self, text: str, images: list[Any], more: list[int]) -> torch.Tensor:
        """[V] transformers' logits behind a prompt and `more` tokens."""
        given = self.inputs(text, images)
        size, tail = given["input_ids"].shape, torch.tensor([more], dtype=torch.int64)
        for name, value in given.items():
            if value.shape == size:
                told = tail if name == "input_ids" else torch.full_like(tail, int(name == "attention_mask"))
                given[name] = torch.cat([value, told.to(value.dtype)], 1)
        return self.model(**given).logits[0, -1]


@cache
def small(family: str) -> Small:
    """A family's small model: the same every time, with larger weights than usual, so that its text wanders."""
    processor, own = processor_of(family)
    config = small_config(family, own)
    torch.manual_seed(0)
    model = model_class(config).from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.04 * torch.randn_like(p)
        if family == "gemma3":  # its embeddings are scaled, and would say each token again
            model.get_input_embeddings().weight *= 0.05
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return Small(model, processor, MARKS[family])
