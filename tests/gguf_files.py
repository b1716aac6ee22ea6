"""Small GGUF files for tests: written by `outrider convert`'s own function, or byte by byte where they are to be damaged."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from outrider.models.convert import convert
from tests.checkpoints import make_checkpoint

TEXT = [
    "def main(): return 'hello' + str(12345)  # a comment",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "été, naïve façade 日本語 🙂 and so on\n\n\ttabs   and spaces",
] * 8
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level(size: int = 320) -> Tokenizer:
    """A trained byte-level tokenizer with three special tokens; GPT-2's way to cut words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet)
    )
    return core


def sentencepiece(size: int = 400) -> Tokenizer:
    """A trained tokenizer of SentencePiece's kind: bytes as tokens, spaces written by a normaliser."""
    special = ["<unk>", "<s>", "</s>"]
    alphabet = sorted({c.replace(" ", "\u2581") for text in TEXT for c in text if ord(c) < 128 and c.isprintable()})
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trained.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=size, special_tokens=[*special, *bytes_], initial_alphabet=alphabet)
    )
    core = Tokenizer.from_str(trained.to_str())
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


def save_tokenizer(core: Tokenizer, folder: Path, **settings: Any) -> None:
    """As transformers saves it, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    whole = PreTrainedTokenizerFast(tokenizer_object=core, **settings)
    whole.chat_template = CHAT
    whole.save_pretrained(folder)


def make_pair(
    folder: Path, family: str = "llama", kind: str = "f32", tokenizer: bool = False, **overrides: Any
) -> tuple[Path, Path]:
    """A checkpoint in Hugging Face format, and the GGUF file made of it."""
    source = folder / "source"
    if tokenizer:
        overrides = {"vocab_size": 320} | overrides
    make_checkpoint(source, family, **overrides)
    if tokenizer:
        save_tokenizer(byte_level(), source, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    out = folder / "model.gguf"
    convert(source, out, kind)
    return source, out


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    """A key with its value, in the file's own bytes."""
    return text(key) + struct.pack("<I", kind) + value


def array(element: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", element, count) + items


def info(name: str, dimensions: tuple[int, ...], kind: int, offset: int) -> bytes:
    """The description of a tensor; dimensions as the file has them, fastest first."""
    sizes = struct.pack(f"<{len(dimensions)}Q", *dimensions)
    return text(name) + struct.pack("<I", len(dimensions)) + sizes + struct.pack("<IQ", kind, offset)


def raw_file(entries: list[bytes], infos: list[bytes] = [], data: bytes = b"", *, version: int = 3) -> bytes:  # noqa: B006
    head = b"GGUF" + struct.pack("<IQQ", version, len(infos), len(entries)) + b"".join(entries) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data
