"""The tensors of a GGUF model: their types checked and their places known; their bytes read when they are asked for.

Bytes are copied out of the file, never mapped: a file that shrinks while it is mapped ends the process.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.errors import ConfigError
from outrider.models.gguf.parts import read_parts
from outrider.models.gguf.reader import Header, TensorInfo
from outrider.nn.blocks import BLOCKS, REMOVED, UNREAD, BlockType, Segment, dequantise, finite

_AGAIN = "download the file again"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file. shape: outermost dimension first; its rows are whole blocks."""

    file: Path
    block: BlockType
    shape: tuple[int, ...]
    offset: int

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numbers // self.block.values * self.block.bytes


class Weights:
    """All tensors of a model. path: any of its files. Raises ConfigError for whatever a file says and cannot be."""

    def __init__(self, path: Path) -> None:
        parts = read_parts(path)
        self.path, self.values = parts.path, parts.values
        self.tensors: dict[str, Stored] = {}
        for header in parts.headers:
            for name, tensor in _stored(header).items():
                if name in self.tensors:
                    raise ConfigError(
                        f"tensor {reprlib.repr(name)} lies in {self.tensors[name].file.name} and {header.path.name}: {_AGAIN}"
                    )
                self.tensors[name] = tensor

    def value(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def segment(self, name: str) -> Segment:
        """A weight as it is stored, [N, bytes of a row]. Raises ConfigError for scales that are no finite numbers."""
        tensor = self.tensors[name]
        raw = torch.empty(tensor.bytes, dtype=torch.uint8)
        try:
            with tensor.file.open("rb", buffering=0) as file:
                file.seek(tensor.offset)
                _fill(file, memoryview(raw.numpy().data))
        except OSError as error:
            raise ConfigError(f"{tensor.file} cannot be read ({error.strerror}): check the disk") from None
        except EOFError:
            raise ConfigError(f"{tensor.file} ends inside of tensor {reprlib.repr(name)}: {_AGAIN}") from None
        found = Segment(tensor.block, raw.view(-1, tensor.block.row_bytes(tensor.shape[-1])))
        if not finite(found):
            raise ConfigError(
                f"tensor {reprlib.repr(name)} of {tensor.file} has a scale that is no finite number: {_AGAIN}"
            )
        return found

    def numbers(self, name: str) -> Float[Tensor, "..."]:
        """A tensor's values, float32, in its shape: for norms and biases."""
        found = self.segment(name)
        return dequantise(found.rows, found.block).view(self.tensors[name].shape)


def _fill(file: Any, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done : done + (1 << 30)])
        if not count:
            raise EOFError
        done += count


def _stored(header: Header) -> dict[str, Stored]:
    """The tensors of one file: types that are known, bytes inside the file, none over another."""
    found = {info.name: Stored(header.path, _block(header, info), info.shape, info.offset) for info in header.tensors}
    end, before = 0, ""
    for name, tensor in sorted(found.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise ConfigError(
                f"{header.path} is damaged (tensors {reprlib.repr(before)} and {reprlib.repr(name)} overlap): {_AGAIN}"
            )
        end, before = tensor.offset + tensor.bytes, name
        if end > header.end:
            raise ConfigError(
                f"{header.path} has {header.end} bytes and tensor {reprlib.repr(name)} ends at {end}: it was cut off, {_AGAIN}"
            )
    return found


def _block(header: Header, info: TensorInfo) -> BlockType:
    block = BLOCKS.get(info.kind)
    if block is None:
        name = UNREAD.get(info.kind) or REMOVED.get(info.kind)
        told = f"is stored as {name}" if name else f"has the unknown type {info.kind}"
        gone = " (llama.cpp removed it)" if info.kind in REMOVED else ""
        known = ", ".join(block.name for block in BLOCKS.values())
        raise ConfigError(
            f"tensor {reprlib.repr(info.name)} of {header.path} {told}{gone}: take a file with one of {known}"
        )
    if info.shape[-1] % block.values:
        raise ConfigError(
            f"{header.path} is damaged (rows of tensor {reprlib.repr(info.name)} have {info.shape[-1]} values, {block.name} "
            f"needs a multiple of {block.values}): {_AGAIN}"
        )
    return block
