"""Weights of a Hugging Face folder -> DecoderWeights, from safetensors only, every size checked before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from outrider.config_keys import PACKED
from outrider.errors import ConfigError
from outrider.models.adapter import read_adapter
from outrider.models.config import Unsupported, layout_of, read_raw_config, shapes_of
from outrider.models.decoder import DecoderConfig, DecoderWeights
from outrider.models.entries import read_entries
from outrider.models.experts import FUSED
from outrider.models.packed import packing_of
from outrider.models.places import without_place
from outrider.models.reading import Progress, Reader
from outrider.mtp_names import head_tensors
from outrider.nn.large_pages import LargePages
from outrider.nn.memory import require_weights


class Checkpoint:
    """A folder whose configuration and tensor headers have been read and agree; nothing is allocated yet.

    folder:     with config.json and model.safetensors, or model.safetensors.index.json and its files; or a LoRA adapter.
    max_length: may shorten the context. Raises ConfigError for a broken folder, Unsupported for one that only transformers may run.
    """

    def __init__(self, folder: Path, *, max_length: int | None = None) -> None:
        self.adapter = read_adapter(folder)
        folder = folder if self.adapter is None else self.adapter.base
        self.raw = read_raw_config(folder)
        self.packing = packing_of(self.raw)
        plain = self.raw if self.packing is None else {k: v for k, v in self.raw.items() if k not in PACKED}
        self.layout = layout_of(plain, max_length)
        self.entries = read_entries(folder)
        experts = self.layout.family.experts
        self.fused = any(name.endswith(FUSED) for name in self.entries) or (experts is not None and experts.bounded)
        self._check_count()
        self.packed: dict[str, dict[str, str]] = {}
        self._check()
        if self.adapter is not None:
            self.adapter.check(self._expected())

    @property
    def config(self) -> DecoderConfig:
        return self.layout.decoder

    @property
    def parameters(self) -> int:
        """Numbers in the weights in memory (a tied head counts once)."""
        return sum(math.prod(shape) for shape in self._expected().values())

    def bytes_of(self, dtype: torch.dtype) -> tuple[int, int, int]:
        """Of all weights in a type, of those of blocks, and of those of experts."""
        c, each, e = self.config, dtype.itemsize, self.config.experts
        numbers = 0 if e is None else 3 * sum(e.sparse) * e.count * e.inner * c.hidden
        # which experts take the place of
        dense = 0 if e is None else 3 * sum(e.sparse) * (c.inner - e.shared) * c.hidden
        return self.parameters * each, (c.layers * c.block_numbers - dense + numbers) * each, numbers * each

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the decoder."""
        return self._expected()

    def tensor(self, name: str) -> Tensor:
        """One tensor, in float32, as it is stored."""
        return Reader(self, [name], torch.float32, torch.device("cpu"), None).tensor(name)

    def parts(self, name: str) -> Iterator[Tensor]:
        """The same along its first dimension, an expert at a time where it holds all of a layer; else the whole."""
        return Reader(self, [name], torch.float32, torch.device("cpu"), None).parts(name)

    def norm(self) -> Tensor:
        """Weights of the final norm, in float32."""
        return self.tensor("model.norm.weight")

    def notice(self, dtype: torch.dtype) -> tuple[str, ...]:
        """What a user should know of how the weights come into memory, a sentence or none."""
        merged = (f"the adapter of {self.adapter.folder} is merged into its base model",) if self.adapter else ()
        if self.packing is None or not self.packed:
            return merged
        name = str(dtype).removeprefix("torch.")
        return (
            *merged,
            f"its weights are unpacked from {self.packing.name} to {name} when they are loaded: the target is what the codes stand "
            f"for, and takes {self.parameters * dtype.itemsize / 2**30:.1f} GiB",
        )

    def read(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
        role: str = "model",
        first: int | None = None,
        memory: LargePages | None = None,
    ) -> DecoderWeights:
        """All weights in `dtype` (bfloat16, float32 or float64) on `device`; CapacityError if they do not fit.

        role: the model's role in messages: "target", "draft". first: only so many blocks. memory: as in `Reader`.
        """
        where, count = torch.device(device), first or self.config.layers
        left_out = self.bytes_of(torch.uint8)[1] * (self.config.layers - count) // self.config.layers
        require_weights(self.parameters - left_out, dtype, where, role)
        reader = Reader(self, list(self._expected()), dtype, where, progress, memory)
        embedding = reader.tensor("model.embed_tokens.weight")
        head = embedding
        if "lm_head.weight" in self._expected():
            head = reader.tensor("lm_head.weight")
            if self.layout.tied and torch.equal(
                head, embedding
            ):  # both stored; unequal ones stay two, as in transformers
                head = embedding
        layers = tuple(reader.layer(i) for i in range(count))
        norm = reader.tensor("model.norm.weight")
        return DecoderWeights(embedding, layers, norm, head, dtype, self.config.wide_norms)

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor the decoder needs."""
        head = not self.layout.tied or "lm_head.weight" in self.entries
        return shapes_of(self.layout, head, "fused" if self.fused else "each")

    def _check_count(self) -> None:
        """Experts times layers may be a large number: nothing is made for each of them before the files are known to have them."""
        experts = self.config.experts
        if experts is not None and not self.fused and sum(experts.sparse) * experts.count > len(self.entries):
            raise ConfigError(
                f"config.json says {sum(experts.sparse)} layers of {experts.count} experts and the files have "
                f"{len(self.entries)} tensors: the two do not belong together, download the checkpoint again"
            )

    def _check(self) -> None:
        expected = self._expected()
        if not any(name in self.entries for name in expected):
            raise Unsupported("its tensors have other names than those of a causal language model")
        for name, shape in expected.items():
            if self._take_packed(name, shape):
                continue
            entry = self.entries.get(name)
            if entry is None:
                raise ConfigError(f"tensor {name} is missing from the weight files: download the checkpoint again")
            if entry.shape != shape:
                raise ConfigError(
                    f"tensor {name} has shape {list(entry.shape)}, config.json says {list(shape)}: "
                    "the two do not belong together, download the checkpoint again"
                )
            if entry.dtype is None:
                raise Unsupported(f"tensor {name} is stored in a quantized format")
        if self.packing is not None and not self.packed:
            raise Unsupported(f"config.json says that its weights are packed ({self.packing.name}), and none is")
        parts = {part for names in self.packed.values() for part in names.values()}
        heads = head_tensors(self.entries, self.config.layers)
        extra = without_place(self.entries.keys() - expected.keys() - parts - heads)
        if extra:
            raise Unsupported(f"tensor {extra[0]} has no place in a {self.config.family} model of this configuration")

    def _take_packed(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a weight is packed; then the names of its tensors are noted. Raises ConfigError for tensors of other shapes."""
        found = None if self.packing is None else self.packing.tensors(name, shape, self.entries)
        if found is not None:
            self.packed[name] = found
        return found is not None


def load_checkpoint(
    folder: Path,
    dtype: torch.dtype,
    *,
    max_length: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> tuple[DecoderConfig, DecoderWeights]:
    """Shape and weights of the checkpoint in `folder`: see `Checkpoint`."""
    checkpoint = Checkpoint(folder, max_length=max_length)
    return checkpoint.config, checkpoint.read(dtype, device, progress)
