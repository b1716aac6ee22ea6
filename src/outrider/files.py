"""Reading untrusted files with bounds, and writing files atomically."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """Read a JSON object of at most `limit` bytes; anything else raises ConfigError."""
    try:
        if not path.is_file():
            raise ConfigError(f"{path} is missing: give a folder in Hugging Face format")
        with path.open("rb") as file:
            text = file.read(limit + 1)
        if len(text) > limit:
            raise ConfigError(
                f"{path} is larger than {limit >> 20} MiB: that is no {path.name} of a model; download it again"
            )
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({reprlib.repr(str(error))}): download it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} does not hold a JSON object: download it again")
    return value


def read_weight_map(index: Path, limit: int) -> dict[str, str]:
    """Name of a tensor -> name of its file, of a model.safetensors.index.json of at most `limit` bytes. Raises ConfigError."""
    placed = read_json(index, limit).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise ConfigError(f"{index} has no weight_map of file names: download it again")
    return placed


def write_whole(path: Path, content: bytes) -> None:
    """Write to a temporary file, sync and rename: a reader sees the old file or the complete new one. Raises ConfigError.

    The folder is created if it is missing.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)  # left by a killed process with the same number
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def sync(path: Path) -> None:
    """Force a file's or a folder's contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
