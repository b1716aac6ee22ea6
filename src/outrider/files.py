"""Reading untrusted files with bounds, and writing files atomically."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Iterator
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


def read_bytes(path: Path, limit: int) -> bytes:
    """What a user's file, or a pipe, holds, of at most `limit` bytes: no more is read, whatever its size is said to be. Raises
    ConfigError."""
    try:
        with path.open("rb") as file:
            found = file.read(limit + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder: name a file in it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    if len(found) > limit:
        raise ConfigError(f"{path}: larger than {limit >> 20} MiB; split it")
    return found


def read_text(path: Path, limit: int) -> str:
    """The text of a user's file, or of a pipe, of at most `limit` bytes, without a byte order mark. Raises ConfigError."""
    found = read_bytes(path, limit)
    try:
        return found.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def parse_json(text: str | bytes, where: object) -> Any:
    """The value of a user's JSON. Raises ConfigError, which begins with `where`, for what is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error.msg})") from None
    except RecursionError:
        raise ConfigError(f"{where}: not JSON that can be read (lists in lists in lists)") from None
    except ValueError as error:  # numbers of thousands of digits, bytes that are no text
        raise ConfigError(f"{where}: not JSON that can be read ({str(error).partition(';')[0][:200]})") from None


def first_is_object(text: str | bytes) -> bool:
    """Whether the first line that is not blank is an object of JSON, as that of JSON lines is."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    start = len(data) - len(data.removeprefix(b"\xef\xbb\xbf").lstrip())
    try:
        return isinstance(json.loads(data[start:].partition(b"\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def json_rows(text: str, where: object) -> Iterator[tuple[str, Any]]:
    """The values of JSON lines, each with its place, "where:line"; blank lines are skipped.

    A line ends at its line feed only: other characters that end lines may stand in JSON's texts.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{where}:{number}", parse_json(line, f"{where}:{number}")


def read_yaml(path: Path, limit: int) -> Any:
    """The plain data of a YAML file of at most `limit` bytes, in which aliases are copies and dates texts. Raises ConfigError,
    also for aliases that stand for more than 16 times as much, and for one that holds itself."""
    import yaml

    text, parts, size = read_text(path, limit), list[str](), 0
    try:
        for part in json.JSONEncoder(default=str).iterencode(yaml.safe_load(text)):
            parts.append(part)
            size += len(part)
            if size > 16 * limit:
                raise ConfigError(
                    f"{path}: its aliases stand for more than {limit >> 16} MiB: write less, or several files"
                )
        return json.loads("".join(parts))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    except (TypeError, ValueError, RecursionError):
        raise ConfigError(f"{path}: it may hold texts, numbers, lists and mappings only, and no loop") from None


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
