"""A corpus of source files: found, cleaned, de-duplicated, split by file, tokenized, and served as batches.

Everything here is a pure function of the files and a seed. In particular batch number ``n`` does not depend on
earlier batches, so the position in the data that a checkpoint must keep is one integer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from outrider.errors import ConfigError
from outrider.files import read_bytes

MAX_BYTES = 1 << 30
"""Largest file that is read."""
# Folders of the standard library that are not sources, or hold deliberately broken files.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib2to3"})


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the path, relative to the corpus root, that it came from."""

    path: str
    text: str

    @property
    def digest(self) -> str:
        """Hash of the normalised text: equal texts are the same document."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def normalise(raw: bytes) -> str | None:
    """UTF-8 text with ``\\n`` line ends and no byte-order mark; None if it is not UTF-8, or is empty."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if text.strip() and "\0" not in text else None


def find_documents(root: Path, pattern: str = "*.py") -> list[Document]:
    """All readable documents below ``root``, in order of their relative path. Raises ConfigError for one above MAX_BYTES."""
    documents = []
    for path in sorted(root.rglob(pattern)):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and path.is_file():
            text = normalise(read_bytes(path, MAX_BYTES))
            if text is not None:
                documents.append(Document(relative.as_posix(), text))
    return documents


def deduplicate(documents: Iterable[Document]) -> list[Document]:
    """The first document of each distinct text, in the given order."""
    first: dict[str, Document] = {}
    for document in documents:
        first.setdefault(document.digest, document)
    return list(first.values())


def is_held_out(path: str, one_in: int = 40) -> bool:
    """Whether a file belongs to the held-out part: by a hash of its path, so it never depends on other files."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % one_in == 0


def split(documents: Sequence[Document], one_in: int = 40) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents; whole files only, so no text is on both sides."""
    training = [d for d in documents if not is_held_out(d.path, one_in)]
    held_out = [d for d in documents if is_held_out(d.path, one_in)]
    return training, held_out


def token_type(vocab_size: int) -> np.dtype:
    """The narrowest type that holds every id below ``vocab_size``: uint16 up to 65,536 tokens, uint32 beyond."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def narrowed(ids: Sequence[int] | np.ndarray, kind: np.dtype) -> np.ndarray:
    """The same ids in a smaller type; raises ConfigError for an id that does not fit, since a cast would make it another token."""
    wide = np.asarray(ids, dtype=np.int64)
    if wide.size and not 0 <= wide.min() <= wide.max() <= np.iinfo(kind).max:
        raise ConfigError(
            f"token {int(wide.max())} does not fit into {kind}: the tokenizer has more tokens than the model's configuration"
        )
    return wide.astype(kind)


def halve(document: Document, share: float = 0.1) -> tuple[Document, Document]:
    """(training, held-out) parts of a single text: the last ``share`` of its lines is held out. ConfigError below two lines."""
    lines = document.text.splitlines(keepends=True)
    cut = min(len(lines) - 1, round(len(lines) * (1.0 - share)))
    if cut < 1:
        raise ConfigError(
            f"{document.path} is the only text and has one line: give more text, so that some can be held out"
        )
    return tuple(Document(f"{document.path}:{i}", "".join(part)) for i, part in enumerate((lines[:cut], lines[cut:])))  # type: ignore[return-value]


def encode(documents: Sequence[Document], tokenizer, end_of_text: int) -> np.ndarray:
    """One flat stream of token ids ``[N]`` of `token_type`, with ``end_of_text`` after every document."""
    kind = token_type(max(len(tokenizer), end_of_text + 1))
    parts = []
    for document in documents:
        ids = tokenizer.encode(document.text, add_special_tokens=False)
        parts.append(narrowed([*ids, end_of_text], kind))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Batches:
    """Shuffled windows of a token stream, addressed by step number.

    The stream is cut into windows of ``length + 1`` tokens (inputs and next tokens overlap by one). Each epoch is a
    permutation of them drawn from ``(seed, epoch)``, and shifts the cuts, so that no epoch sees the same windows.
    """

    stream: np.ndarray  # [N] token ids
    rows: int
    length: int
    seed: int = 0

    @property
    def per_epoch(self) -> int:
        """Whole batches in one pass over the stream."""
        batches = (len(self.stream) - 1 - self.length) // self.length // self.rows
        if batches < 1:
            raise ValueError(f"{len(self.stream)} tokens are fewer than one batch of {self.rows} x {self.length}")
        return batches

    def __call__(self, step: int) -> torch.Tensor:
        """Batch ``[rows, length + 1] int64`` of step ``step``."""
        epoch, index = divmod(step, self.per_epoch)
        generator = np.random.default_rng((self.seed, epoch))
        shift = int(generator.integers(self.length))
        order = generator.permutation(self.per_epoch * self.rows)
        starts = shift + order[index * self.rows : (index + 1) * self.rows] * self.length
        windows = np.stack([self.stream[s : s + self.length + 1] for s in starts])
        return torch.from_numpy(windows.astype(np.int64))


def windows(stream: np.ndarray, length: int, limit: int | None = None) -> torch.Tensor:
    """Non-overlapping windows ``[M, length + 1]`` in order, at most ``limit``, spread evenly over the stream."""
    count = (len(stream) - 1) // length
    chosen = range(count) if limit is None or limit >= count else np.linspace(0, count - 1, limit).astype(int)
    return torch.from_numpy(np.stack([stream[i * length : i * length + length + 1] for i in chosen]).astype(np.int64))


def excerpts(documents: Sequence[Document], tokenizer, count: int, seed: int) -> list[dict[str, str]]:
    """``count`` prompts of 60-120 tokens that begin and end at line starts, taking the documents in turn."""
    long_enough = [d for d in documents if len(d.text) > 2000]
    if not long_enough:
        raise ValueError("no document is long enough for a prompt")
    random = np.random.default_rng(seed)
    found: list[dict[str, str]] = []
    for attempt in range(100 * count):
        document = long_enough[attempt % len(long_enough)]
        text, size, wanted = "", 0, int(random.integers(60, 101))
        lines = document.text.splitlines(keepends=True)
        for line in lines[int(random.integers(len(lines))) :]:
            text += line
            size = len(tokenizer.encode(text, add_special_tokens=False))
            if size >= wanted:
                break
        fresh = all(row["prompt"] != text for row in found)
        if wanted <= size <= 120 and not text[0].isspace() and fresh:
            found.append({"prompt": text, "source": document.path})
        if len(found) == count:
            return found
    raise ValueError(f"only {len(found)} of {count} prompts found")
