"""From a path or a Hub name to the place of a model: a folder in Hugging Face format, or a GGUF file."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

from outrider.errors import ConfigError
from outrider.files import sha256_of
from outrider.models.gguf.parts import all_parts, first_part, is_gguf, only_file

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")
_UNWANTED = ("*/*", "consolidated*", "*.bin", "*.pt", "*.gguf", "*.onnx")


def resolve_folder(path_or_name: str | Path) -> Path:
    """The folder itself, the GGUF file (the first of a split set), or the Hub's snapshot of that name, downloaded if necessary.

    A folder that holds one GGUF model and no config.json stands for it. Raises ConfigError if there is nothing of that name.
    """
    if not str(path_or_name).strip():  # which would be the working folder
        raise ConfigError("the name of a model is empty: give a folder or a Hub name")
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return only_file(path) or path
    name = str(path_or_name)
    if is_gguf(path):
        return first_part(path)
    if path.exists():
        raise ConfigError(
            f"{name} is a file: give a GGUF file, or the folder that holds config.json and model.safetensors"
        )
    if not _HUB_NAME.fullmatch(name) or ".." in name or path.suffix.lower() == ".gguf":
        raise ConfigError(
            f"there is no folder {name}: give a folder in Hugging Face format, a GGUF file or a Hub name like 'owner/model'"
        )
    return _download(name)


def identity_of(folder: Path) -> str:
    """The identity of the model in a folder or a GGUF file: a digest of its weights, configuration and tokenizer.

    Every byte is read, at about a gigabyte per second, which is little compared with a training: a part of the weights would not
    distinguish two models of which another layer was tuned.
    """
    digest, kinds = hashlib.sha256(), ("*.safetensors", "*.json", "*.model", "*.jinja")
    found = all_parts(folder) if is_gguf(folder) else [p for kind in kinds for p in folder.glob(kind)]
    for path in sorted(found):
        digest.update(f"{path.name} {sha256_of(path)};".encode())
    return digest.hexdigest()


def files_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and modification time (ns) of a model's files: another training in the same folder differs."""
    kinds = ("*.safetensors", "*.json")
    found = all_parts(folder) if is_gguf(folder) else [p for kind in kinds for p in folder.glob(kind)]
    return tuple(sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in found))


def require_config(folder: Path) -> None:
    """Raise ConfigError for a folder without config.json, with a hint at what else it seems to hold."""
    if is_gguf(folder) or any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return
    hint = ""
    inner = sorted(p.parent for p in folder.glob("*/config.json"))
    if inner:
        hint = f"; did you mean {inner[0]}?"
    raise ConfigError(f"{folder} has no config.json: give a folder in Hugging Face format, or a GGUF file{hint}")


@cache
def _download(name: str) -> Path:
    """One snapshot per name and process, so that weights and tokenizer come from the same revision."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)))
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"there is no folder {name}, and the Hub did not provide it ({reason.rstrip('.')}): "
            "check the name and the network, or download the model and give its folder"
        ) from None
