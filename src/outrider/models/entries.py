"""The tensors of a Hugging Face folder, from the headers of its safetensors files: names, shapes, types, and where they lie."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from outrider.errors import ConfigError
from outrider.files import read_weight_map

INDEX_BYTES = 64 << 20
_WIDE = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor's file, shape and type, from the header of its file. stored: safetensors' name of its type."""

    file: Path
    stored: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        """Its type, None if it is not a plain floating-point type."""
        return _STORED.get(self.stored)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype else _WIDE.get(self.stored, 1))


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the folder's safetensors files, by name."""
    if (folder / "adapter_config.json").exists() or (folder / "adapter_model.safetensors").exists():
        raise ConfigError(
            f"{folder} holds an adapter beside its weights: merge it into them (peft: merge_and_unload), or remove its files"
        )
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return dict(_header(_inside(folder, single.name)))
    if not index.exists():
        if any(any(folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth")):
            raise ConfigError(
                f"{folder} holds pickled weights, which can run code when read: convert them with transformers "
                "(model.save_pretrained(folder) writes safetensors)"
            )
        raise ConfigError(f"{folder} holds no model.safetensors: give a folder in Hugging Face format")
    placed = read_weight_map(index, INDEX_BYTES)
    found: dict[str, Entry] = {}
    for name in sorted(set(placed.values())):
        for key, entry in _header(_inside(folder, name)):
            if key in found:
                raise ConfigError(
                    f"tensor {reprlib.repr(key)} lies in {found[key].file.name} and in {name}: download the checkpoint again"
                )
            found[key] = entry
    lost = placed.keys() - found.keys()
    if lost:
        raise ConfigError(
            f"tensor {reprlib.repr(min(lost))} is not in the file the index names: download the checkpoint again"
        )
    return found


def _inside(folder: Path, name: str) -> Path:
    """A weight file of the folder. Links may point inside the folder, or to the blobs of the Hub's cache layout."""
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise ConfigError(f"the weight index names {reprlib.repr(name)}, which is no safetensors file of this folder")
    file, home = folder / name, folder.resolve()
    real = file.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
        raise ConfigError(f"{file} is a link that leaves its folder: copy the file itself into the folder")
    if not real.is_file():
        raise ConfigError(f"{file} is missing: download the checkpoint again")
    return real


def _header(file: Path) -> Iterator[tuple[str, Entry]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                part = tensors.get_slice(name)
                yield name, Entry(file, part.get_dtype(), tuple(part.get_shape()))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{file} is damaged ({reprlib.repr(str(error))}): download it again") from None
