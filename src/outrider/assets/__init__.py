"""The shipped pair: `pycode`, a small target and its draft, made by `recipes/pycode.py`."""

from __future__ import annotations

import json
from pathlib import Path

from outrider.errors import ConfigError

HERE = Path(__file__).parent


def shipped(part: str) -> Path:
    """Folder of a part of the shipped pair: "target" or "draft"."""
    path = HERE / "pycode" / part
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"the shipped pair is incomplete ({path.name} is missing): reinstall outrider, or run recipes/pycode.py"
        )
    return path


def shipped_images() -> Path:
    """Folder of the shipped model of image tokens: handwritten digits, made by `recipes/image_tokens.py`."""
    path = HERE / "digits" / "target"
    if not (path / "raster.json").is_file():
        raise ConfigError(
            "the shipped image model is incomplete: reinstall outrider, or run recipes/image_tokens.py export --kind digits"
        )
    return path


def prompts_file() -> Path:
    """Held-out prompts of the shipped pair's domain, none of whose files was seen in training: `prompt` and `source` per line."""
    return HERE / "pycode" / "prompts.jsonl"


def chat_prompts_file() -> Path:
    """Questions for chat models, written for this project: `messages` and a `category` per line."""
    return HERE / "chat" / "prompts.jsonl"


def shipped_prompts() -> list[str]:
    """The prompts of `prompts_file`."""
    return [json.loads(line)["prompt"] for line in prompts_file().read_text(encoding="utf-8").splitlines()]
