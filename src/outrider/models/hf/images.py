"""Images in prompts, for any model of transformers that puts them among its text's embeddings; no family is known by name.

The model's own processor turns a text and pictures into tokens and pixels. The model's own vision part turns the pixels of an image
into rows, once: they are kept by the digest of the pixels, and to the target they are embeddings that its text part is given
(`models.hf.entry`). Before the first prompt a small image is read both ways, by the model alone and by rows in chunks: what differs
is refused.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from outrider.conversations import rendered_text
from outrider.errors import CapabilityError, OutriderError, RequestError
from outrider.models.hf.attention_interface import AttentionInterfacePath
from outrider.models.hf.entry import Entry, entry_of
from outrider.models.hf.image_trial import try_image
from outrider.models.hf.state import brief
from outrider.models.hf.target import HFTarget
from outrider.pictured import FIRST_KEY, ImageInput, ImagePrompt, ImageRows, Pictured, Range
from outrider.pictures import as_pictures, trial_picture

KEPT = 256 << 20
"""Bytes of rows that are kept for images that were seen last, whether anybody has them or not."""
KNOWN = 1 << 16
"""Images whose keys are remembered, so that the cache of beginnings knows them again."""


class HFImages:
    """Implements `protocols.ImageReader` for a target.

    make: gives the processor, when it is first needed. Raises CapabilityError from the first use on if the model cannot read images
    this way.
    """

    def __init__(self, target: HFTarget, make: Callable[[], Any]) -> None:
        self.target, self._make = target, make
        self._processor: Any = None
        self._refused: str | None = None
        self._key, self._keys = FIRST_KEY, OrderedDict[bytes, int]()
        self._rows: OrderedDict[tuple[bytes, int], ImageRows] = OrderedDict()
        # rows that a sequence or a waiting prompt has are known as long as it has them, however many they are
        self._held: WeakValueDictionary[tuple[bytes, int], ImageRows] = WeakValueDictionary()

    # ------------------------------------------------------------------ the processor
    @property
    def processor(self) -> Any:
        """The model's own."""
        if self._processor is None:
            self._processor = self._make()
        return self._processor

    def mark(self) -> str:
        """What stands in a text for an image."""
        found = getattr(self.processor, "boi_token", None) or getattr(self.processor, "image_token", None)
        if not isinstance(found, str):
            raise CapabilityError(f"{type(self.processor).__name__} names no token for images: choose another model")
        return found

    @property
    def _token(self) -> int:
        """The id that stands at every row of an image."""
        config = self.target.model.config
        found = next(
            (getattr(config, n, None) for n in ("image_token_id", "image_token_index") if hasattr(config, n)), None
        )
        if not isinstance(found, int):
            raise CapabilityError(
                f"{type(self.target.model).__name__} names no token of image rows: choose another model"
            )
        return found

    def read(self, text: str, images: Sequence[Any], special: bool | None = None) -> ImagePrompt:
        """See `protocols.ImageReader`."""
        pictures = as_pictures(images)
        if not pictures:
            raise RequestError("a prompt with images needs at least one: send a text alone as it is")
        marks = text.count(self.mark())
        if marks != len(pictures):
            raise RequestError(
                f"the text has {marks} places for images ({self.mark()}) and there are {len(pictures)} images: it needs one "
                "for each"
            )
        whole = self._processed(text, pictures, special)
        alone = (
            [whole]
            if len(pictures) == 1
            else [self._processed(self.mark(), [picture], special) for picture in pictures]
        )
        return self._prompt(whole, alone)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> ImagePrompt:
        """See `protocols.ImageReader`."""
        images, shown = list[Any](), list[dict[str, Any]]()
        for message in messages:
            content = message.get("content")
            parts = [] if isinstance(content, str) or content is None else content
            images += [part.get("image") for part in parts if part.get("type") == "image"]
            bare = [{k: v for k, v in part.items() if k != "image"} for part in parts]
            shown.append({**message, **({"content": bare} if parts else {})})
        own = getattr(self.processor, "chat_template", None)
        chosen = {"chat_template": own} if own else {}
        given = {"add_generation_prompt": True, **chosen, **options}
        try:
            text = rendered_text(self.processor.tokenizer, shown, **given)
        except Exception as error:  # templates refuse orders of roles by raising, and are outside code
            raise RequestError(f"the model's chat template refuses these messages ({brief(error)})") from None
        return self.read(text, images)

    def _processed(self, text: str, pictures: list[Any], special: bool | None) -> dict[str, Any]:
        """What the processor makes of a text and its pictures: tensors."""
        given = _without_bos(self.processor, text) if special is None else {"add_special_tokens": special}
        try:
            found = self.processor(text=[text], images=[pictures], return_tensors="pt", **given)
        except OutriderError:
            raise
        except Exception as error:  # it may refuse sizes and texts in any way
            why = brief(error)
            raise RequestError(
                f"the model's processor refuses this prompt ({why}): change the image or the text"
            ) from None
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def _prompt(self, whole: dict[str, Any], alone: list[dict[str, Any]]) -> ImagePrompt:
        """The prompt of `whole`; `alone` has the tensors of each image by itself."""
        tokens = whole["input_ids"][0].tolist()
        places = [at for at, token in enumerate(tokens) if token == self._token]
        images, next_row = list[ImageInput](), 0
        for single in alone:
            own = single["input_ids"][0].tolist()
            rows = [at for at, token in enumerate(own) if token == self._token]
            mine = places[next_row : next_row + len(rows)]
            next_row += len(rows)
            if not rows or len(mine) != len(rows) or tokens[mine[0] : mine[-1] + 1] != own[rows[0] : rows[-1] + 1]:
                raise RequestError("this model reads several images differently from one: send one image a prompt")
            segment = own[rows[0] : rows[-1] + 1]
            images.append(ImageInput(mine[0], mine[-1] + 1, single, rows[0], _digest(segment, single)))
        if next_row != len(places):
            raise RequestError("the text has the model's own token of image rows: leave it out")
        limit = self.target.vocab_size
        return ImagePrompt((token if token < limit else 0 for token in tokens), images)

    def prove(self) -> None:
        """Read a small image, by the model alone and by rows; raise CapabilityError from now on if that is not the same.

        It takes as long as two prompts with an image, and is done once.
        """
        if self._refused is None:
            refused = ""
            try:
                self._try()
            except (CapabilityError, RequestError) as error:
                refused = str(error)
            self._refused = refused
        if self._refused:
            raise CapabilityError(self._refused)

    def _try(self) -> None:
        target = self.target
        if not isinstance(target.serving_path, AttentionInterfacePath) or target.text_part is None:
            why = target.why.get("seam", "its blocks were not found")
            raise CapabilityError(
                f"{type(target.model).__name__} takes text only, because {why}: choose another model for images"
            )
        prompt = self.read(f"one {self.mark()} two three four", [trial_picture()])
        image = prompt.images[0]
        tensors = {name: _moved(value, target) for name, value in image.tensors.items()}
        try_image(target, prompt, Pictured((self._rows_of(image),), (image.first,)), tensors)

    # ------------------------------------------------------------------ the model
    def rows(self, image: ImageInput) -> ImageRows:
        """See `protocols.ImageReader`."""
        self.prove()
        return self._rows_of(image)

    def _rows_of(self, image: ImageInput) -> ImageRows:
        name = (image.digest, self.target.weights)
        found = self._rows.pop(name, None) or self._held.get(name) or self._seen(image)
        self._rows[name] = self._held[name] = found
        held = sum(rows.nbytes for rows in self._rows.values())
        while held > KEPT and len(self._rows) > 1:
            held -= self._rows.popitem(last=False)[1].nbytes
        return found

    def _seen(self, image: ImageInput) -> ImageRows:
        """Run the vision part on an image."""
        target, length = self.target, image.end - image.first
        assert target.text_part is not None
        tensors = {name: _moved(value, target) for name, value in image.tensors.items()}
        pictured = image.tensors["input_ids"][0] == self._token
        entry = entry_of(target.model, target.text_part, tensors, pictured)
        cut = slice(image.at, image.at + length)
        where = tuple(pictured[cut].nonzero()[:, 0].tolist())
        turns, span = None, length
        if entry.turns is not None:
            turns, span = _turns(entry.turns, image.at, length)
        embeds = entry.embeds[cut][list(where)].clone()
        seen = _open(entry, image.at, _runs(where))
        return ImageRows(self._key_of(image), length, where, embeds, turns, span, seen, entry.deep, entry.marks)

    def _key_of(self, image: ImageInput) -> int:
        """The first of the keys of an image: the same for the same image, and never another's."""
        key = self._keys.pop(image.digest, None)
        if key is None:
            key, self._key = self._key, self._key + image.end - image.first
        self._keys[image.digest] = key
        if len(self._keys) > KNOWN:
            self._keys.popitem(last=False)
        return key


def _without_bos(processor: Any, text: str) -> dict[str, Any]:
    """The argument that keeps the tokenizer from beginning a text twice: what a template has written begins it already."""
    begin = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    return {"add_special_tokens": False} if begin and text.startswith(begin) else {}


def _digest(segment: list[int], tensors: Mapping[str, Any]) -> bytes:
    """Of an image's pixels and of everything else but the text that the processor has made of it."""
    digest, shape = hashlib.sha256(repr(segment).encode()), tensors["input_ids"].shape
    for name, value in sorted(tensors.items()):
        if value.shape != shape:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.digest()


def _moved(value: Tensor, target: HFTarget) -> Tensor:
    return value.to(target.device, target.dtype if value.is_floating_point() else None)


def _turns(turns: Tensor, at: int, length: int) -> tuple[Tensor | None, int]:
    """Positions of the segment of `length` rows at `at`, from its own beginning, and where what follows begins."""
    begin = int(turns[:, at - 1].max()) + 1 if at else int(turns[:, 0].min())
    own = turns[:, at : at + length].cpu() - begin
    span = int(own.max()) + 1
    plain = span == length and bool((own == torch.arange(length)).all())
    return (None if plain else own.clone()), span


def _runs(where: Sequence[int]) -> list[Range]:
    """The ranges of numbers that follow each other."""
    edges = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(where)) if b != a + 1), len(where)]
    return [(where[a], where[b - 1] + 1) for a, b in pairwise(edges)]


def _open(entry: Entry, at: int, runs: Sequence[Range]) -> tuple[Range, ...]:
    """The runs of image rows that all see each other, also those that follow. Raises CapabilityError for another view than that."""
    if not entry.masks:
        return ()
    n = len(entry.embeds)
    ahead = torch.ones(n, n, dtype=torch.bool).triu(1)
    kinds = {bool((mask.cpu() & ahead).any()) for mask in entry.masks.values()}
    if kinds == {False}:
        return ()
    wanted = torch.zeros(n, n, dtype=torch.bool)
    for a, b in runs:
        inside = slice(at + a, at + b)
        wanted[inside, inside] = True
        if not all(bool(mask[inside, inside].all()) for mask in entry.masks.values()):
            raise CapabilityError(
                f"an image of {b - a} rows is larger than a window of this model's attention, which is not supported: make the "
                "image smaller"
            )
    if any(bool(((mask.cpu() & ahead) != (wanted & ahead)).any()) for mask in entry.masks.values()):
        raise CapabilityError(
            "where it has images, rows of this model's text see what follows them, beyond each image itself, which is not "
            "supported: choose another model for images"
        )
    return tuple(runs)
