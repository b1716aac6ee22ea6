"""transformers' own tokenizer of a folder. Needs no torch, and imports none: a server reads texts in processes without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_fast_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a folder that `tokenizer.load_tokenizer` has checked; runs no code of the folder, fetches nothing.

    Raises the library's errors for a damaged file, which may be a bare Exception.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True, trust_remote_code=False)
