"""Training data of a learned drafter: text the target wrote, and the target's hidden states on it, kept on disk.

Two stages, each resumable at the row where it stopped. `write_tokens` lets the engine continue prompts cut from a corpus
(text that the target itself writes improves acceptance most: Whalen et al. 2026, table 5), `write_hidden` captures hidden states
through `Target.forward`. The target's distribution is not stored: it is the last hidden state through the head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.build import Engine
from outrider.errors import ConfigError
from outrider.files import write_whole
from outrider.params import SamplingParams
from outrider.protocols import Target
from outrider.train.data import Document, narrowed, token_type
from outrider.types import Draft, Rows

Report = Callable[[str], None]
CPU = torch.device("cpu")
NGRAM, MOST_REPEATED = 8, 0.5
"""A row in which more than this share of the n-grams are repeated is a loop, and is left out unless `repeats` allows it."""


@dataclass(frozen=True, slots=True)
class DataSpec:
    """The contents of a data folder: rows of `prompt` tokens of text and `length - prompt` tokens written by the target.

    prompt = length: the original text, nothing generated. temperature: of the target's text; several: the rows have them in turn.
    """

    rows: int
    prompt: int = 64
    length: int = 256
    temperature: float | tuple[float, ...] = 1.0
    seed: int = 0

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Row i is written at number i of these, modulo their number."""
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)

    def __post_init__(self) -> None:
        if not self.temperatures:
            raise ConfigError("name the temperature at which the target writes")
        if self.rows < 1:
            raise ConfigError(f"rows of training text are 1 or more, got {self.rows}")
        if not 1 <= self.prompt <= self.length:
            raise ConfigError(
                f"a row of {self.length} tokens cannot begin with {self.prompt} of the text: with 1 to {self.length}"
            )

    def bytes(self, layers: int, hidden: int, vocab_size: int) -> int:
        """Bytes on disk of tokens and hidden states of so many layers."""
        return self.rows * self.length * (token_type(vocab_size).itemsize + 2 * layers * hidden)


@dataclass(frozen=True)
class Features:
    """Rows of text with the target's hidden states, as batches addressed by step number.

    tokens: [M, L] ids. hidden: [M, L, T, H] float16: hidden[:, t, k] after block `layers[k]` at position t; memory-mapped, or a
    tensor that is held whole. device: of the batches.
    """

    tokens: np.ndarray
    hidden: np.ndarray | Tensor
    layers: tuple[int, ...]
    rows: int = 8
    seed: int = 0
    device: torch.device = CPU

    @property
    def per_epoch(self) -> int:
        """Whole batches in one pass."""
        return max(1, len(self.tokens) // self.rows)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Batch of step `step`: tokens [rows, L] and hidden states [rows, L, T, H] float32."""
        epoch, index = divmod(step, self.per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.tokens))
        return self.take(np.sort(order[index * self.rows : (index + 1) * self.rows]))

    def take(self, chosen: np.ndarray | list[int]) -> tuple[Int[Tensor, "r L"], Float[Tensor, "r L T H"]]:
        """The rows `chosen`."""
        hidden = torch.as_tensor(self.hidden[chosen], device=self.device).float()
        return torch.from_numpy(self.tokens[chosen].astype(np.int64)).to(self.device), hidden


def cut_prompts(
    documents: Sequence[Document],
    encode: Callable[[str], list[int]],
    wanted: DataSpec,
    apart: Collection[tuple[int, ...]] = (),
) -> list[list[int]]:
    """`wanted.rows` pieces of exactly `wanted.prompt` tokens that begin at line starts, from all documents in turn, without those
    in `apart`."""
    random = np.random.default_rng(wanted.seed)
    order = random.permutation(len(documents))
    found: list[list[int]] = []
    for attempt in range(40 * wanted.rows):
        lines = documents[int(order[attempt % len(order)])].text.splitlines(keepends=True)
        start = int(random.integers(max(1, len(lines) - wanted.prompt // 8)))
        text = "".join(lines[start : start + 2 * wanted.prompt])[: 16 * wanted.prompt]
        piece = encode(text)[: wanted.prompt]
        if len(piece) == wanted.prompt and tuple(piece) not in apart:
            found.append(piece)
        if len(found) == wanted.rows:
            return found
    other = " that the training does not have" if apart else ""
    raise ConfigError(
        f"the text has only {len(found)} pieces of {wanted.prompt} tokens{other}, {wanted.rows} are needed"
    )


def write_tokens(
    engine: Engine,
    documents: Sequence[Document],
    wanted: DataSpec,
    folder: Path,
    report: Report = print,
    apart: Collection[tuple[int, ...]] = (),
    span: range | None = None,
) -> np.ndarray:
    """Text rows [M, L] of `folder`; missing ones are generated by the engine. A row depends on its number alone.

    apart: beginnings that no row may have: those of the rows it will be compared with. span: the numbers of the rows
    of a folder that is a shard; it begins where a group does (`group_of`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    _same(folder / "wanted.json", asdict(wanted))
    kind, span = token_type(engine.parts.target.vocab_size), range(wanted.rows) if span is None else span
    done, tokens = _open(folder, "tokens", (len(span), wanted.length), kind)
    if done < len(span):
        prompts = cut_prompts(documents, engine.encode, wanted, apart)[span.start : span.stop]
        group = group_of(engine.scheduler.slots)
        for first in range(done, len(span), group):
            part = prompts[first : first + group]
            tokens[first : first + len(part)] = narrowed(_continue(engine, part, span.start + first, wanted), kind)
            _flush(folder, "tokens", tokens, first + len(part))
            report(f"text: {first + len(part)}/{len(span)} rows")
    return tokens


def group_of(slots: int) -> int:
    """Rows that are generated together, and committed together."""
    return 4 * slots


def _continue(engine: Engine, prompts: list[list[int]], first: int, wanted: DataSpec) -> np.ndarray:
    more = wanted.length - wanted.prompt
    if not more:
        return np.asarray(prompts)
    several = wanted.temperatures
    params = [
        SamplingParams(
            temperature=several[row % len(several)],
            max_tokens=more,
            ignore_eos=True,
            seed=wanted.seed * 1_000_003 + row,
        )
        for row in range(first, first + len(prompts))
    ]
    results = engine.generate(prompts, params)
    return np.asarray([[*r.prompt, *r.outputs[0].token_ids] for r in results])


def write_hidden(
    target: Target, tokens: np.ndarray, layers: tuple[int, ...], folder: Path, *, rows: int = 4, report: Report = print
) -> np.ndarray:
    """Hidden states [M, L, T, H] float16 of `tokens` after the blocks `layers`; missing ones are computed."""
    _same(folder / "hidden.json", {"layers": list(layers), "hidden": target.hidden_size})
    shape = (*tokens.shape, len(layers), target.hidden_size)
    done, hidden = _open(folder, "hidden", shape, np.float16)
    for first in range(done, len(tokens), rows):
        part = tokens[first : first + rows].astype(np.int64)
        states = hidden_of(target, torch.from_numpy(part), layers).half().cpu()
        if not bool(torch.isfinite(states).all()):
            raise ConfigError("a hidden state does not fit into float16: train on a target of a smaller range")
        hidden[first : first + len(part)] = states.numpy()
        end = first + len(part)
        if end == len(tokens) or first // rows % 32 == 31:
            _flush(folder, "hidden", hidden, end)
            report(f"hidden states: {end}/{len(tokens)} rows")
    return hidden


@torch.inference_mode()
def hidden_of(target: Target, tokens: Int[Tensor, "r L"], layers: tuple[int, ...]) -> Float[Tensor, "r L T H"]:
    """Hidden states of whole rows from one forward into an empty cache."""
    count, length = tokens.shape
    rows = Rows.assemble(
        list(range(count)), tokens.tolist(), [0] * count, Draft.empty(0, target.device), [False] * count
    )
    states = target.forward(rows, target.new_kv(count, length), layers=layers).hidden
    return torch.stack(states, 1).float().view(count, length, len(layers), -1)


def read_features(
    folder: Path,
    layers: tuple[int, ...],
    *,
    hidden: Path | None = None,
    rows: int,
    seed: int,
    repeats: float = MOST_REPEATED,
    device: torch.device = CPU,
    report: Report = print,
) -> Features:
    """Finished data of `folder`, without rows that repeat themselves. Raises ConfigError for another choice of layers.

    hidden: the folder of the hidden states; None: they are beside the text. repeats: the largest share of repeated n-grams that a
    row may have. device: of the batches.
    """
    beside = folder if hidden is None else hidden
    held = json.loads((beside / "hidden.json").read_text())["layers"]
    if not set(layers) <= set(held):
        raise ConfigError(f"{beside} holds hidden states of layers {held}, not of {list(layers)}: use a new folder")
    tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
    states = np.load(beside / "hidden.npy", mmap_mode="r", allow_pickle=False)
    fine = [i for i, row in enumerate(tokens) if repeated(row) <= repeats]
    if not fine:
        raise ConfigError(
            f"every row of {folder} goes in circles: allow more repeats, or write at a higher temperature"
        )
    if len(fine) < len(tokens):
        report(f"{len(tokens) - len(fine)} of {len(tokens)} rows go in circles and are left out")
        tokens, states = _Rows(tokens, fine), _Rows(states, fine)
    return Features(tokens, states, tuple(held), rows, seed, device)  # type: ignore[arg-type]


class _Rows:
    """Some rows of a memory-mapped array, read on access."""

    def __init__(self, array: np.ndarray, rows: list[int]) -> None:
        self._array, self._rows = array, np.asarray(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, chosen: Any) -> np.ndarray:
        return self._array[self._rows[chosen]]


def repeated(row: np.ndarray) -> float:
    """Share of the n-grams of a row that occurred earlier in it."""
    grams = [tuple(row[i : i + NGRAM].tolist()) for i in range(len(row) - NGRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _same(path: Path, values: dict[str, Any]) -> None:
    """Write the purpose of a folder, or check that it is the same."""
    values = json.loads(json.dumps(values))  # as it is read
    if not path.exists():
        write_whole(path, (json.dumps(values, indent=1) + "\n").encode())
    elif (found := json.loads(path.read_text())) != values:
        raise ConfigError(f"{path.parent} was made for {found}, not for {values}: use a new folder")


def _open(folder: Path, name: str, shape: tuple[int, ...], kind: Any) -> tuple[int, np.ndarray]:
    """The number of finished rows, and the array; rows after them are written again."""
    path, progress = folder / f"{name}.npy", folder / f"{name}.done"
    done = int(progress.read_text()) if progress.exists() else 0
    if not done:
        np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape).flush()
    array = np.lib.format.open_memmap(path, mode="r+")
    if array.shape != shape or array.dtype != np.dtype(kind):
        found, wanted = (f"{t} of shape {s}" for t, s in ((array.dtype, array.shape), (np.dtype(kind), shape)))
        raise ConfigError(f"{path} holds {found}, not {wanted}: use a new folder")
    return done, array


def _flush(folder: Path, name: str, array: Any, done: int) -> None:
    array.flush()
    write_whole(folder / f"{name}.done", str(done).encode())
