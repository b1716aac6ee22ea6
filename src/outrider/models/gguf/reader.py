"""The header of a GGUF file: its keys, and where its tensors lie. Every read is checked against the file's size.

Format: ggml's `docs/gguf.md`. Needs no torch: a server reads tokenizers in processes without it. The checks are at least those of
llama.cpp; the limits are far above any real file.
"""

from __future__ import annotations

import os
import reprlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""The numbers of the format's types, as `struct` spells them; 7 is a bool."""
_NUMBERS = {kind: struct.Struct("<" + code) for kind, code in _FORMATS.items()}
_HEAD, _U32, _U64, _INFO = struct.Struct("<4sI2Q"), struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<IQ")
_LEAST_KEY, _LEAST_TENSOR = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8
"""Bytes of the shortest key with its value, and of the shortest description of a tensor."""
STRING_BYTES = 64 << 20
HEADER_BYTES = 512 << 20
NAME_BYTES = 63
ITEMS = 1 << 22
"""Most elements of an array; the largest real vocabulary has a sixteenth of it."""
ALIGNMENT, MOST_ALIGNMENT = 32, 1 << 20
DIMENSIONS = 4
_BLOCK = 1 << 20
_AGAIN = "download the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor. shape: outermost dimension first, as in torch. kind: ggml's number of its type.

    offset: of its first byte, from the beginning of the file.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Strings:
    """An array of strings whose places are known; `decoded` makes Python strings of them, which only tokenizers need."""

    pieces: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.pieces)

    def decoded(self, key: str, path: Path) -> list[str]:
        """The strings. Raises ConfigError for one that is not UTF-8."""
        try:
            return [piece.decode() for piece in self.pieces]
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: {key} holds a text that is not UTF-8: {_AGAIN}") from None


@dataclass(frozen=True, slots=True)
class Header:
    """Keys and tensors of one file. Values are int, float, bool, str, tuples of the first three, and `Strings`.

    element_types: key of an array -> the format's number of its elements' type. end: bytes of the file.
    """

    path: Path
    values: dict[str, Any]
    element_types: dict[str, int]
    tensors: tuple[TensorInfo, ...]
    end: int


def read_header(path: Path) -> Header:
    """The header of a file, remembered while the file does not change. Raises ConfigError for a damaged one."""
    try:
        state = path.stat()
        return _read(path, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): check the path") from None


@lru_cache(maxsize=4)
def _read(path: Path, size: int, _changed: int) -> Header:
    with path.open("rb", buffering=0) as file:
        cursor = Cursor(path, file.fileno(), size)
        return _parse(cursor)


class Cursor:
    """A place in a file. Bytes are asked for before they are used, and asking beyond the end raises ConfigError."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path, self.size, self.place = path, size, 0
        self._descriptor, self._held = descriptor, b""

    @property
    def left(self) -> int:
        return self.size - self.place

    def fail(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path} is damaged ({what}): {_AGAIN}")

    def need(self, count: int) -> bytes:
        """The bytes read so far, `count` of them behind the place."""
        end = self.place + count
        if end > self.size:
            raise self.fail(f"it ends after {self.size} bytes, inside its header")
        if end > HEADER_BYTES:
            raise self.fail(f"its header has more than {HEADER_BYTES >> 20} MiB")
        if end > len(self._held):
            more = max(end - len(self._held), len(self._held), _BLOCK)
            self._held += os.pread(self._descriptor, min(more, self.size - len(self._held)), len(self._held))
            if end > len(self._held):
                raise self.fail("it was cut off while it was read")
        return self._held

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        held, place = self.need(layout.size), self.place
        self.place += layout.size
        return layout.unpack_from(held, place)

    def string(self, most: int = STRING_BYTES) -> bytes:
        (length,) = self.take(_U64)
        if length > min(most, self.left):
            raise self.fail(f"a text of {length} bytes where at most {min(most, self.left)} can follow")
        held, place = self.need(length), self.place
        self.place += length
        return held[place : place + length]

    def text(self, what: str, most: int = STRING_BYTES) -> str:
        try:
            return self.string(most).decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def strings(self, count: int) -> tuple[bytes, ...]:
        """`count` strings: the loop over a vocabulary, with everything at hand."""
        out, unpack = [], _U64.unpack_from
        held, place = self.need(0), self.place
        for _ in range(count):
            if place + 8 > len(held):
                self.place = place
                held = self.need(8)
            (length,) = unpack(held, place)
            place += 8
            if place + length > len(held):
                self.place = place
                if length > min(STRING_BYTES, self.left):
                    raise self.fail(f"a text of {length} bytes where at most {self.left} can follow")
                held = self.need(length)
            out.append(held[place : place + length])
            place += length
        self.place = place
        return tuple(out)


def _parse(cursor: Cursor) -> Header:
    if cursor.size < _HEAD.size:
        raise ConfigError(f"{cursor.path} is no GGUF file (it has {cursor.size} bytes): {_AGAIN}")
    magic, version, tensors, keys = cursor.take(_HEAD)
    if magic != MAGIC:
        raise ConfigError(f"{cursor.path} is no GGUF file (it begins with {magic!r}): give the path of one")
    if not version & 0xFFFF:
        raise ConfigError(f"{cursor.path} is a GGUF file for big-endian machines: take the usual, little-endian one")
    if version not in VERSIONS:
        raise ConfigError(f"{cursor.path} has version {version} of GGUF, 2 and 3 are read: convert the model again")
    if keys > cursor.left // _LEAST_KEY or tensors > cursor.left // _LEAST_TENSOR:
        raise cursor.fail(f"{keys} keys and {tensors} tensors do not fit into {cursor.size} bytes")
    values: dict[str, Any] = {}
    element_types: dict[str, int] = {}
    for _ in range(keys):
        key = cursor.text("the name of a key", 1 << 16)
        if not key or key in values:
            raise cursor.fail(f"the key {reprlib.repr(key)} occurs twice" if key else "a key has no name")
        values[key] = _value(cursor, key, element_types)
    infos = list(_infos(cursor, tensors))
    alignment = values.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {reprlib.repr(alignment)}, which is no power of two up to 2^20")
    return _placed(cursor, values, element_types, infos, alignment)


def _value(cursor: Cursor, key: str, element_types: dict[str, int]) -> Any:
    (kind,) = cursor.take(_U32)
    if kind == STRING:
        return cursor.text(f"the value of {reprlib.repr(key)}")
    if kind == ARRAY:
        element, count = cursor.take(_INFO)
        element_types[key] = element
        if count > ITEMS:
            raise cursor.fail(f"{reprlib.repr(key)} has {count} elements, no model has so many")
        if element == STRING:
            if count > cursor.left // 8:
                raise cursor.fail(f"{reprlib.repr(key)} has {count} texts, more than can follow")
            return Strings(cursor.strings(count))
        if element not in _NUMBERS:
            nested = "arrays, which no model has" if element == ARRAY else f"values of the unknown type {element}"
            raise cursor.fail(f"{reprlib.repr(key)} holds {nested}")
        width = _NUMBERS[element].size
        if count > cursor.left // width:
            raise cursor.fail(f"{reprlib.repr(key)} has {count} numbers, more than can follow")
        found = cursor.take(struct.Struct(f"<{count}{_FORMATS[element]}"))
        return tuple(map(_bool(cursor, key), found)) if element == 7 else found
    if kind not in _NUMBERS:
        raise cursor.fail(f"{reprlib.repr(key)} has the unknown type {kind}")
    (number,) = cursor.take(_NUMBERS[kind])
    return _bool(cursor, key)(number) if kind == 7 else number


def _bool(cursor: Cursor, key: str) -> Callable[[int], bool]:
    def convert(number: int) -> bool:
        if number > 1:
            raise cursor.fail(f"{reprlib.repr(key)} is {number} where true or false is expected")
        return bool(number)

    return convert


def _infos(cursor: Cursor, count: int) -> Iterator[TensorInfo]:
    """The descriptions of tensors; offsets are still those of the data section."""
    seen: set[str] = set()
    for _ in range(count):
        name = cursor.text("the name of a tensor", NAME_BYTES)
        if not name or name in seen:
            raise cursor.fail(f"tensor {reprlib.repr(name)} occurs twice" if name else "a tensor has no name")
        seen.add(name)
        (dimensions,) = cursor.take(_U32)
        if not 1 <= dimensions <= DIMENSIONS:
            raise cursor.fail(
                f"tensor {reprlib.repr(name)} has {dimensions} dimensions, 1 to {DIMENSIONS} are possible"
            )
        shape = tuple(reversed(cursor.take(struct.Struct(f"<{dimensions}Q"))))
        product = 1
        for size in shape:
            product *= size
        if not 0 < product < 1 << 63:
            raise cursor.fail(f"tensor {reprlib.repr(name)} has the shape {list(shape)}")
        kind, offset = cursor.take(_INFO)
        yield TensorInfo(name, kind, shape, offset)


def _placed(
    cursor: Cursor, values: dict[str, Any], element_types: dict[str, int], infos: list[TensorInfo], alignment: int
) -> Header:
    """The header, with offsets from the beginning of the file."""
    begin = -(-cursor.place // alignment) * alignment
    for info in infos:
        if info.offset % alignment or info.offset > max(cursor.size - begin, 0):
            raise cursor.fail(
                f"tensor {reprlib.repr(info.name)} begins at {info.offset}, not at a place inside the file"
            )
    placed = tuple(TensorInfo(i.name, i.kind, i.shape, begin + i.offset) for i in infos)
    return Header(cursor.path, values, element_types, placed, cursor.size)
