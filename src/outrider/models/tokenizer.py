"""Tokenizers of checkpoints: loading one safely, and a digest of its vocabulary."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from outrider import protocols
from outrider.errors import ConfigError
from outrider.files import read_json
from outrider.models.adapter import home_of
from outrider.models.config import CONFIG_BYTES
from outrider.models.fast_tokenizer import read_fast_tokenizer
from outrider.models.folder import resolve_folder
from outrider.models.gguf.parts import is_gguf
from outrider.models.gguf.tokenizer import GgufTokenizer, read_gguf_tokenizer
from outrider.models.gguf.vocabulary import has_vocabulary, stops

TOKENIZER_BYTES = 128 << 20
"""Largest tokenizer.json that is read; the largest real ones have 35 MB."""


def load_tokenizer(path_or_name: str | Path) -> Any:
    """The fast tokenizer of a folder, a GGUF file or a Hub name; runs no code of it. Raises ConfigError if there is none.

    A tokenizer.json beside a GGUF file goes before the file's own vocabulary only where that one cannot be read.
    """
    folder = resolve_folder(path_or_name)
    return _of_gguf(folder) if is_gguf(folder) else _of_folder(home_of(folder, "tokenizer.json"))


def _of_folder(folder: Path) -> Any:
    core = folder / "tokenizer.json"
    if not core.is_file():
        raise ConfigError(
            f"{folder} has no tokenizer.json: save it with transformers' fast tokenizer "
            "(tokenizer.save_pretrained(folder))"
        )
    for file in (core, *folder.glob("*.jinja"), *folder.glob("*token*.json")):
        if file.stat().st_size > TOKENIZER_BYTES:
            raise ConfigError(f"{file} is larger than {TOKENIZER_BYTES >> 20} MiB, no tokenizer is: download it again")
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and read_json(settings, TOKENIZER_BYTES).get("auto_map"):
        raise ConfigError(
            f"{settings} names code of its own (auto_map), which Outrider never runs: remove it "
            "or use another tokenizer"
        )
    try:
        plain = _plain(folder)
        if plain is not None:
            return plain
        return read_fast_tokenizer(folder)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise ConfigError(
            f"the tokenizer in {folder} cannot be read ({reprlib.repr(str(error))}): download it again"
        ) from None


def _of_gguf(path: Path) -> Any:
    try:
        return read_gguf_tokenizer(path)
    except ConfigError:
        if not (path.parent / "tokenizer.json").is_file():
            raise
    return _of_folder(path.parent)


def whole_tokenizer(path_or_name: str | Path) -> Any:
    """The tokenizer of a folder as a transformers object: it can be saved, with all its special tokens."""
    tokenizer = load_tokenizer(path_or_name)  # which refuses code, and what is too large
    if isinstance(tokenizer, GgufTokenizer):
        return _as_transformers(tokenizer)
    if hasattr(tokenizer, "save_pretrained"):
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_folder(path_or_name), local_files_only=True, trust_remote_code=False)


def _as_transformers(tokenizer: GgufTokenizer) -> Any:
    from transformers import PreTrainedTokenizerFast

    named = {name: text for name, text in tokenizer.special.items() if text is not None}
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer.core, **named)
    whole.chat_template = tokenizer.chat_template
    return whole


def find_tokenizer(path_or_name: str | Path) -> Any | None:
    """`load_tokenizer`, or None for a model that has none: it works on token ids."""
    folder = resolve_folder(path_or_name)
    if is_gguf(folder):
        return load_tokenizer(folder) if has_vocabulary(folder) else None
    folder = home_of(folder, "tokenizer.json")
    return load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None


class PlainTokenizer:
    """A tokenizer.json alone: encodes and decodes as transformers' generic class, without importing it.

    That import takes 85 MB and two seconds, more than a small model needs in total.
    """

    chat_template = None

    def __init__(self, core: Tokenizer, eos_token_id: int | None) -> None:
        self._core, self.eos_token_id = core, eos_token_id

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._core.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._core.decode(ids, skip_special_tokens=skip_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        return self._core.get_vocab(with_added_tokens=True)


SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
PLAIN_SETTINGS = frozenset({
    "tokenizer_class", "clean_up_tokenization_spaces", "model_max_length", "backend", "is_local", "local_files_only",
    "name_or_path", "transformers_version", "padding_side", "truncation_side", "model_input_names",
})  # fmt: skip
"""Keys of tokenizer_config.json that do not affect the ids of a text; with any other key transformers reads the folder."""


def _plain(folder: Path) -> PlainTokenizer | None:
    """The plain tokenizer of a folder whose settings need no transformers, else None."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file, TOKENIZER_BYTES) if file.is_file() else {}
    generic = settings.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    unread = {key for key, value in settings.items() if value is not None} - PLAIN_SETTINGS - set(SPECIAL)
    if not generic or unread or settings.get("clean_up_tokenization_spaces") or any(folder.glob("*.jinja")):
        return None
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.no_padding()
    core.no_truncation()
    marked = {token.content for token in core.get_added_tokens_decoder().values() if token.special}
    named = [settings[key] for key in SPECIAL if settings.get(key) is not None]
    if not all(isinstance(token, str) and token in marked for token in named):
        return None  # transformers marks it as special, so that it is one token in a text and left out in decoding
    eos = settings.get("eos_token")
    return PlainTokenizer(core, core.token_to_id(eos) if isinstance(eos, str) else None)


def disable_bpe_cache(tokenizer: Any) -> None:
    """Keep no words of encoded texts in memory: for servers, whose texts belong to clients.

    A fast BPE tokenizer caches up to 10,000 words in every thread that encodes, from 0.4 MB on, and never frees them; encoding is
    some 20% slower without. A tokenizer without such a cache is not changed.
    """
    core = getattr(tokenizer, "_core", None) or getattr(tokenizer, "backend_tokenizer", None)
    resize = getattr(getattr(core, "model", None), "_resize_cache", None)
    if resize is not None:
        resize(0)


def vocab_fingerprint(tokenizer: protocols.Tokenizer) -> str:
    """SHA-256 (hex) of the vocabulary, id by id: equal exactly when every id stands for the same string."""
    digest = hashlib.sha256()
    for text, token in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{token}:{len(text)}:{text}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def stop_ids(path_or_name: str | Path, tokenizer: Any = None, rows: int = 0) -> tuple[int, ...]:
    """Tokens that end a text: from generation_config.json, else from config.json; and the tokenizer's own end of text.

    A GGUF file names its own. rows: of the model's embedding; 0 if unknown.

    Raises ConfigError if generation_config.json (config.json, where there is none) sets a constraint on every text, which is not
    supported here, and for an end that the embedding has no row for: texts would never come to it.
    """
    folder = resolve_folder(path_or_name)
    ends = stops(folder) if is_gguf(folder) else _ends_named(home_of(folder), tokenizer)
    behind = [token for token in ends if not 0 <= token < rows] if rows else []
    if behind:
        raise ConfigError(
            f"{folder} names the end-of-text token {behind[0]}, and its embedding has {rows} rows: correct eos_token_id "
            "in its generation_config.json and config.json, or eos_token in its tokenizer_config.json"
        )
    return ends


def _ends_named(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The ends that a folder's configurations and its tokenizer name."""
    generation, config = folder / "generation_config.json", folder / "config.json"
    if generation.is_file():
        refuse_constraints(read_json(generation, CONFIG_BYTES), generation)
    elif config.is_file():  # older checkpoints: transformers takes them from here then, those of the text model first
        raw = read_json(config, CONFIG_BYTES)
        for part in (raw.get("text_config"), raw.get("decoder"), raw):
            refuse_constraints(part if isinstance(part, Mapping) else {}, config)
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file() and not found:
            found = _ids_of(read_json(folder / name, CONFIG_BYTES).get("eos_token_id"), folder / name)
    own = getattr(tokenizer, "eos_token_id", None)
    return tuple(dict.fromkeys([*found, *([own] if isinstance(own, int) else [])]))


def _ids_of(named: Any, file: Path) -> list[int]:
    """The tokens that an `eos_token_id` names. Raises ConfigError for what is none: a text would never end."""
    ids = [] if named is None else named if isinstance(named, list) else [named]
    if not all(type(i) is int for i in ids):
        raise ConfigError(
            f"{file}: eos_token_id must be a token id or a list of them, got {reprlib.repr(named)}: correct it, since it ends texts"
        )
    return ids


CONSTRAINTS: dict[str, tuple[Any, ...]] = {
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": ([],),
    "exponential_decay_length_penalty": (),
    "no_repeat_ngram_size": (0,),
    "stop_strings": ([],),
    "watermarking_config": (),
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "force_words_ids": ([],),
    "constraints": ([],),
}
"""Keys of generation_config.json that constrain every text of transformers' `generate`, with their neutral values.

Its other keys are defaults of sampling, which each request sets here.
"""


def refuse_constraints(raw: Mapping[str, Any], file: Path | str) -> None:
    """Raise ConfigError for a generation configuration that constrains every text. file: where it is from, for the message."""
    for key, free in CONSTRAINTS.items():
        if raw.get(key) is not None and raw[key] not in free:
            raise ConfigError(
                f"{file} sets {key}, which is not applied here: remove it, and set it in the request "
                "(logit_bias bans tokens, stop ends texts)"
            )
