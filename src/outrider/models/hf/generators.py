"""Models of transformers that write images as tokens (Janus, Emu3), as targets whose texts are image codes.

Each has its own way of making the next token from the text's last hidden state, of embedding it, and of making pixels of a whole
image (its VQ decoder); what is here says where these are, and runs no loop. `transformers` cannot write images with Chameleon
(5.24 masks its image tokens and has no decoder for them).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from outrider.conversations import rendered_text
from outrider.errors import CapabilityError, ConfigError
from outrider.files import read_json
from outrider.models.config import CONFIG, CONFIG_BYTES
from outrider.models.framed import Frame
from outrider.models.guided import FreeText
from outrider.models.hf.state import brief
from outrider.models.hf.target import HFTarget

MOST = 1 << 16
"""Most codes of an image."""
_LIMIT = 1 << 20
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
"""Mean and standard deviation of pixels that processors use when a folder does not say."""

Decode = Callable[[Sequence[int]], UInt8[np.ndarray, "h w 3"]]


@dataclass(frozen=True, eq=False)
class ImageGenerator:
    """A model that writes images.

    target: scores image codes; texts outside images are not its business (`models.framed`). prompt: a description -> tokens, up to
    the place where the image begins. decode: the codes of one image, all of them -> pixels. free: the text without a condition, for
    guidance. guidance: its own scale. points: [V, d] the place of every token's code in the codebook, scaled so that no two are
    more than 1 apart; NaN: it is no code.
    """

    target: HFTarget
    frame: Frame
    prompt: Callable[[str], list[int]]
    decode: Decode
    free: FreeText
    guidance: float
    points: Float[np.ndarray, "V d"]


class CodeHead(nn.Module):
    """A head of image codes as one of the whole vocabulary, codes first; other tokens get 0, and are masked by the frame."""

    def __init__(self, head: nn.Module, others: int) -> None:
        super().__init__()
        self.head, self.others = head, others

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.pad(self.head(hidden), (0, self.others))


def kind_of(folder: Path) -> str:
    """The `model_type` of a folder; "" if it has none."""
    path = folder / CONFIG
    return str(read_json(path, CONFIG_BYTES).get("model_type", "")) if path.is_file() else ""


def load_generator(
    folder: Path, dtype: torch.dtype | None = None, size: tuple[int, int] | None = None
) -> ImageGenerator:
    """The model of a folder. size: height and width in codes, for models that write images of any size.

    Raises ConfigError for a folder of another kind, one without a tokenizer, or a size that it cannot write.
    """
    kind = kind_of(folder)
    if kind not in GENERATORS:
        raise ConfigError(
            f"{folder} ({kind or 'no model_type'}) is no model that writes images: it needs a raster.json (docs/images.md), or to "
            f"be one of {', '.join(sorted(GENERATORS))}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # it may fail in any way
        raise ConfigError(f"{folder}: its tokenizer cannot be loaded ({brief(error)}): fetch it again") from None
    whole = HFTarget.load(folder, dtype=dtype, pictured=True)
    return GENERATORS[kind](whole, tokenizer, folder, size)


def _named(tokenizer: Any, names: Sequence[str], folder: Path) -> int:
    """The id of a mark: an attribute of the tokenizer, or the mark itself."""
    for name in names:
        mark = getattr(tokenizer, name, None) if name.isidentifier() else name
        found = tokenizer.get_vocab().get(mark) if isinstance(mark, str) else None
        if found is not None:
            return int(found)
    raise ConfigError(f"{folder}: its tokenizer lacks the mark of an image ({names[-1]}): fetch the folder again")


def pixels(folder: Path, default: tuple[list[float], list[float]], colours: Float[Tensor, "h w 3"]) -> np.ndarray:
    """Pixels 0 to 255 of what a decoder has made, which is normalised as the folder's processor normalises pixels."""
    path = folder / "preprocessor_config.json"
    said = read_json(path, _LIMIT) if path.is_file() else {}
    try:
        mean, std = (
            torch.tensor(np.broadcast_to(said.get(name) or value, 3).astype(np.float32))
            for name, value in (("image_mean", default[0]), ("image_std", default[1]))
        )
    except (ValueError, TypeError):
        raise ConfigError(f"{path}: image_mean and image_std must be a number or three: download it again") from None
    return ((colours.float().cpu() * std + mean) * 255.0).round().clamp(0, 255).to(torch.uint8).numpy()


def _janus(whole: HFTarget, tokenizer: Any, folder: Path, size: tuple[int, int] | None) -> ImageGenerator:
    """Codes have a head and embeddings of their own; here they are the first tokens of one vocabulary, the text's follow."""
    model: Any = whole.model
    inner, vq = model.model, model.config.vq_config
    side, codes = int(vq.num_patches), int(inner.generation_embeddings.num_embeddings)
    if size not in (None, (side, side)):
        raise ConfigError(f"{folder} writes images of {side} x {side} codes only: leave out the size")
    text = inner.language_model
    with torch.no_grad():
        table = torch.cat(
            [model.prepare_embeddings_for_image_generation(torch.arange(codes)), text.get_input_embeddings().weight]
        )
    config = copy.deepcopy(text.config)
    config.vocab_size, config.tie_word_embeddings = len(table), False
    with torch.device("meta"):
        causal: Any = AutoModelForCausalLM.from_config(config)
    text.set_input_embeddings(nn.Embedding.from_pretrained(table))
    setattr(causal, causal.base_model_prefix, text)
    causal.lm_head = CodeHead(inner.generation_head, len(table) - codes)
    settings = model.generation_config  # from the folder's generation_config.json, if it has one
    begin = codes + _named(tokenizer, ("boi_token", "<begin_of_image>"), folder)
    bos, pad = (codes + int(getattr(settings, f"{n}_token_id") or 0) for n in ("bos", "pad"))
    free = {t: pad for t in range(codes, len(table)) if t not in (bos, begin)}

    def prompt(description: str) -> list[int]:
        return [codes + t for t in _asked(tokenizer, description)] + [begin]

    def decode(values: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            return pixels(folder, ([0.5] * 3, [0.5] * 3), model.decode_image_tokens(torch.tensor([list(values)]))[0])

    frame = Frame(torch.arange(len(table)) < codes, side, side)
    book = nn.functional.normalize(inner.vqmodel.quantize.embedding.weight.detach().float(), dim=-1)  # as it decodes
    points = placed(len(table), {i: i for i in range(codes)}, book / 2)
    target = HFTarget(causal.eval().requires_grad_(False), ours=True)
    scale = max(1.0, scale_of(settings, 5.0))  # transformers guides with none below 1
    return ImageGenerator(target, frame, prompt, decode, FreeText(free), scale, points)


def _emu3(whole: HFTarget, tokenizer: Any, folder: Path, size: tuple[int, int] | None) -> ImageGenerator:
    """Codes are tokens of the text's vocabulary; a mark ends every row, and the prompt states the size."""
    model: Any = whole.model
    height, width = size or (90, 90)
    if not (height > 0 and width > 0 and height * width <= MOST):
        raise ConfigError(f"an image of {height} x {width} codes cannot be written: choose at most {MOST} codes")
    names = model.model.vocabulary_mapping
    code_of = {int(token): int(code) for token, code in names.bpe2img.items()}
    book = model.model.vqmodel.quantize.embedding.weight.detach().float()
    if names.eol_token_id is None or not code_of:
        raise ConfigError(f"{folder}: its vocabulary_map names no image codes: fetch config.json again")
    if not (max(code_of.values()) < len(book) and max(code_of) < whole.vocab_size):
        raise ConfigError(
            f"{folder}: its vocabulary_map and its weights are of different models: fetch the folder again"
        )
    begin = _named(tokenizer, ("image_wrapper_token", "<|image token|>"), folder)
    start = _named(tokenizer, ("boi_token", "<|image start|>"), folder)
    codes = torch.zeros(whole.vocab_size, dtype=torch.bool)
    codes[list(code_of)] = True

    def prompt(description: str) -> list[int]:
        shape = tokenizer.encode(f"{height}*{width}", add_special_tokens=False)
        tokens = [*_asked(tokenizer, description), start, *shape, begin]
        if tokens.index(begin) < len(tokens) - 1:
            raise ConfigError("the description has the mark behind which an image begins: leave it out")
        return tokens

    def decode(values: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            made = model.model.vqmodel.decode(
                torch.tensor([code_of[v] for v in values], device=whole.device).view(1, height, width)
            )
        return pixels(folder, CLIP, made.reshape(-1, *made.shape[-2:])[:3].permute(1, 2, 0))

    frame, free = Frame(codes, height, width, int(names.eol_token_id), begin), FreeText(mark=begin, prompt=(begin,))
    spread = book - book.mean(0)
    points = placed(whole.vocab_size, code_of, spread / (2 * spread.norm(dim=-1).max()).clamp(min=1e-30))
    return ImageGenerator(whole, frame, prompt, decode, free, scale_of(model.generation_config, 1.0), points)


def scale_of(settings: Any, default: float) -> float:
    """The scale of guidance that a folder's generation_config.json states."""
    return default if settings.guidance_scale is None else float(settings.guidance_scale)


def placed(vocab_size: int, code_of: Mapping[int, int], book: Float[Tensor, "C d"]) -> Float[np.ndarray, "V d"]:
    """The place of every token: that of its code in `book`; NaN for tokens that are none."""
    out = np.full((vocab_size, book.shape[1]), np.nan)
    out[list(code_of)] = book.double().cpu().numpy()[list(code_of.values())]
    return out


GENERATORS: Mapping[str, Callable[[HFTarget, Any, Path, tuple[int, int] | None], ImageGenerator]] = {
    "janus": _janus,
    "emu3": _emu3,
}
"""By `model_type`."""


def _asked(tokenizer: Any, description: str) -> list[int]:
    """A description as the model's chat template puts it, if it has one, as tokens."""
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": description}]
        try:
            text = rendered_text(tokenizer, message, add_generation_prompt=True)
        except Exception as error:  # templates are outside code
            raise CapabilityError(f"the model's chat template refuses a description ({brief(error)})") from None
        return list(tokenizer.encode(text, add_special_tokens=False))
    begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    return begin + list(tokenizer.encode(description, add_special_tokens=False))
