"""Tokenizers of checkpoints: loading one safely, and telling two vocabularies apart."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tokenizers import Tokenizer

from outrider.errors import ConfigError
from outrider.target.config import CONFIG_BYTES, read_json
from outrider.target.folder import resolve_folder

TOKENIZER_BYTES = 128 << 20
"""Largest tokenizer.json that is read: the largest real ones have 35 MB."""


@runtime_checkable
class Vocabulary(Protocol):
    """What is needed of a tokenizer to compare it: its strings and their ids."""

    def get_vocab(self) -> Mapping[str, int]: ...


def load_tokenizer(path_or_name: str | Path) -> Any:
    """The fast tokenizer of a folder or Hub name; no code of the folder is run. Raises ConfigError if there is none."""
    folder = resolve_folder(path_or_name)
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
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise ConfigError(
            f"the tokenizer in {folder} cannot be read ({reprlib.repr(str(error))}): download it again"
        ) from None


class PlainTokenizer:
    """A tokenizer.json and nothing else: what transformers' generic class does for text and ids, without importing it.

    That import costs 85 MB and two seconds, more than a small model needs altogether.
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


def _plain(folder: Path) -> PlainTokenizer | None:
    """The plain tokenizer of a folder whose settings leave nothing for transformers to do, else None."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file, TOKENIZER_BYTES) if file.is_file() else {}
    generic = settings.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    special = {
        "chat_template",
        "add_bos_token",
        "add_eos_token",
        "add_prefix_space",
        "added_tokens_decoder",
    } & settings.keys()
    if not generic or special or settings.get("clean_up_tokenization_spaces") or any(folder.glob("*.jinja")):
        return None
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.no_padding()
    core.no_truncation()
    eos = settings.get("eos_token")
    return PlainTokenizer(core, core.token_to_id(eos) if isinstance(eos, str) else None)


def forget_words(tokenizer: Any) -> None:
    """Keep no words of the texts that are encoded: for servers, whose texts are others'.

    A fast BPE tokenizer keeps up to 10,000 words in every thread that encodes, 0.4 MB before the first one, and never lets go of
    them; encoding a text is some 20% slower without. Nothing is done for a tokenizer that has no such memory.
    """
    core = getattr(tokenizer, "_core", None) or getattr(tokenizer, "backend_tokenizer", None)
    resize = getattr(getattr(core, "model", None), "_resize_cache", None)
    if resize is not None:
        resize(0)


def vocab_fingerprint(tokenizer: Vocabulary) -> str:
    """SHA-256 (hex) of the vocabulary, id by id: equal exactly when every id stands for the same string."""
    digest = hashlib.sha256()
    for text, token in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{token}:{len(text)}:{text}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def first_difference(a: Vocabulary, b: Vocabulary) -> tuple[int, str, str] | None:
    """The lowest id that stands for different strings in the two vocabularies, with both strings; None if there is none.

    Ids that only one of them knows are padding of a model's embedding and do not count.
    """
    ours = {token: text for text, token in a.get_vocab().items()}
    theirs = {token: text for text, token in b.get_vocab().items()}
    for token in sorted(ours.keys() & theirs.keys()):
        if ours[token] != theirs[token]:
            return token, ours[token], theirs[token]
    return None


def stop_ids(path_or_name: str | Path, tokenizer: Any = None) -> tuple[int, ...]:
    """Tokens that end a text: of generation_config.json, else of config.json; and the tokenizer's own end of text."""
    folder = resolve_folder(path_or_name)
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file() and not found:
            named = read_json(folder / name, CONFIG_BYTES).get("eos_token_id")
            found = [i for i in (named if isinstance(named, list) else [named]) if isinstance(i, int)]
    own = getattr(tokenizer, "eos_token_id", None)
    return tuple(dict.fromkeys([*found, *([own] if isinstance(own, int) else [])]))
