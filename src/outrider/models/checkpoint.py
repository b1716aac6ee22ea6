"""Weights of a Hugging Face folder -> DecoderWeights, from safetensors only, every size checked before anything is allocated.

Files are mapped again for each group of tensors: an open map keeps every page it has read in memory, so reading a file through
one map would hold the weights twice. Here the peak is the weights plus one block (or one embedding).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from outrider.config_keys import PACKED
from outrider.errors import ConfigError
from outrider.models.adapter import read_adapter
from outrider.models.config import SINKS, Layout, Unsupported, layout_of, read_raw_config, shapes_of
from outrider.models.decoder import DecoderConfig, DecoderWeights, LayerWeights
from outrider.models.entries import read_entries
from outrider.models.experts import FUSED, expert_names
from outrider.models.packed import packing_of
from outrider.models.places import without_place
from outrider.models.rotary import halves
from outrider.mtp_names import head_tensors
from outrider.nn.memory import require_weights

Progress = Callable[[float], None]
"""Called with the share of the weights read so far, in (0, 1]."""


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
        dense = 0 if e is None else 3 * sum(e.sparse) * c.inner * c.hidden  # which experts take the place of
        return self.parameters * each, (c.layers * c.block_numbers - dense + numbers) * each, numbers * each

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the decoder."""
        return self._expected()

    def tensor(self, name: str) -> Tensor:
        """One tensor, in float32, as it is stored."""
        return _Reader(self, [name], torch.float32, torch.device("cpu"), None).tensor(name)

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
    ) -> DecoderWeights:
        """All weights in `dtype` (bfloat16, float32 or float64) on `device`; CapacityError if they do not fit.

        role: the model's role in messages: "target", "draft". first: only so many blocks.
        """
        where, count = torch.device(device), first or self.config.layers
        left_out = self.bytes_of(torch.uint8)[1] * (self.config.layers - count) // self.config.layers
        require_weights(self.parameters - left_out, dtype, where, role)
        reader = _Reader(self, list(self._expected()), dtype, where, progress)
        embedding = reader.tensor("model.embed_tokens.weight")
        head = embedding
        if "lm_head.weight" in self._expected():
            head = reader.tensor("lm_head.weight")
            if self.layout.tied and torch.equal(
                head, embedding
            ):  # both stored; unequal ones stay two, as in transformers
                head = embedding
        layers = tuple(reader.layer(i, self.layout, self.fused) for i in range(count))
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
        packing, base = self.packing, name.removesuffix("weight")
        codes = self.entries.get(base + packing.codes) if packing is not None else None
        if packing is None or codes is None or len(shape) != packing.dimensions or codes.stored not in packing.kinds:
            return False
        found: dict[str, str] = {}
        for end, expected in packing.shapes(*shape).items():
            entry = self.entries.get(base + end)
            if entry is None and end in packing.optional:
                continue
            if entry is None or entry.shape != expected or not all(expected):
                has = "is missing" if entry is None else f"has shape {list(entry.shape)}"
                raise ConfigError(
                    f"tensor {base + end} {has}, where {packing.name} of a weight of {list(shape)} has {list(expected)}: "
                    "the checkpoint is damaged, download it again"
                )
            found[end] = base + end
        self.packed[name] = found
        return True


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


def _by_expert(t: dict[str, Tensor], turns: bool) -> dict[str, Tensor]:
    """Joined tensors of experts, [E, gate and up, H] and [E, H, I], in the order of `LayerWeights`. turns: gates and ups take
    turns, and inputs come before outputs."""
    if not turns:
        return {
            "gate_up": t["gate_up"].unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2),
            "down": t["down"].flatten(0, 1),
        }
    return {
        "gate_up": t["gate_up"].mT.unflatten(1, (-1, 2)).permute(2, 0, 1, 3).flatten(0, 2).contiguous(),
        "gate_up_bias": t["gate_up_bias"].unflatten(1, (-1, 2)).permute(2, 0, 1).flatten(),
        "down": t["down"].mT.flatten(0, 1).contiguous(),
        "down_bias": t["down_bias"].flatten(),
    }


class _Reader:
    """Copies tensors into newly allocated, fused ones, in the requested dtype and on the requested device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        wanted: Sequence[str],
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self._checkpoint, self._dtype, self._device, self._progress = checkpoint, dtype, device, progress
        self._entries, self._shapes = checkpoint.entries, checkpoint.shapes
        self._done, self._all = 0, sum(self._entries[part].bytes for name in wanted for part in self._parts(name))

    def _parts(self, name: str) -> Sequence[str]:
        """The tensors in the files that a weight is made of."""
        return list(self._checkpoint.packed[name].values()) if name in self._checkpoint.packed else [name]

    def tensor(self, name: str) -> Tensor:
        return self._group([(name,)])[0]

    def layer(self, i: int, layout: Layout, fused: bool) -> LayerWeights:
        family, c = layout.family, layout.decoder
        block, attention, mlp = f"model.layers.{i}.", f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        heads = ("qkv",) if "qkv" in family.fused else tuple("qkv")
        names: dict[str, tuple[str, ...]] = {
            "qkv": tuple(f"{attention}{part}_proj.weight" for part in heads),
            "o": (f"{attention}o_proj.weight",),
            "gate_up": tuple(
                f"{mlp}{p}_proj.weight" for p in (["gate_up"] if "gate_up" in family.fused else ["gate", "up"])
            ),
            "down": (f"{mlp}down_proj.weight",),
        }
        names |= {place: (f"{block}{name}.weight",) for place, name in family.norms}
        if layout.qkv_bias:
            names["qkv_bias"] = tuple(f"{attention}{part}_proj.bias" for part in heads)
        if layout.o_bias:
            names["o_bias"] = (f"{attention}o_proj.bias",)
        if family.qk_norm:
            names |= {"q_norm": (f"{attention}q_norm.weight",), "k_norm": (f"{attention}k_norm.weight",)}
        if family.sinks:
            names["sinks"] = (block + SINKS,)
        sparse = c.experts is not None and c.experts.sparse[i]
        if sparse:
            names |= {field: tuple(f"{block}{n}" for n in parts) for field, parts in expert_names(c, fused).items()}
        t = dict(zip(names, self._group(list(names.values())), strict=True))
        if sparse and fused:
            t |= _by_expert(t, family.experts is not None and family.experts.bounded)
        turned, count = (c.heads + c.kv_heads) * c.head_dim, 2 * len(c.inv_freq)
        for rows in (t[name][:turned] for name in ("qkv", "qkv_bias") if name in t and family.interleaved):
            rows.copy_(halves(rows.view(turned, -1), c.heads + c.kv_heads, c.head_dim, count).view(rows.shape))
        return LayerWeights(**{f.name: t.get(f.name) for f in fields(LayerWeights)})  # type: ignore[arg-type]

    def _group(self, fused: Sequence[tuple[str, ...]]) -> list[Tensor]:
        """One tensor for each tuple of names: those tensors stacked along the first dimension."""
        files = {self._entries[part].file for names in fused for name in names for part in self._parts(name)}
        try:
            with ExitStack() as stack:
                maps = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
                return [self._fuse(names, maps) for names in fused]
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"a weight file cannot be read ({reprlib.repr(str(error))}): download it again") from None

    def _fuse(self, names: tuple[str, ...], maps: dict[Path, safe_open]) -> Tensor:
        shapes = [self._shapes[name] for name in names]
        family, norm = self._checkpoint.layout.family, names[0].endswith("norm.weight")
        dtype = torch.promote_types(self._dtype, torch.float32) if norm and family.wide_norms else self._dtype
        out = torch.empty((sum(s[0] for s in shapes), *shapes[0][1:]), dtype=dtype, device=self._device)
        for name, part in zip(names, out.split([s[0] for s in shapes]), strict=True):
            part.copy_(self._value(name, maps))
            self._done += sum(self._entries[piece].bytes for piece in self._parts(name))
            if self._progress:
                self._progress(self._done / self._all)
        return out.add_(1) if norm and family.shifted else out

    def _value(self, name: str, maps: dict[Path, safe_open]) -> Tensor:
        """A weight with what an adapter adds to it."""
        value, adapter = self._stored_value(name, maps), self._checkpoint.adapter
        return value if adapter is None else adapter.added(name, value)

    def _stored_value(self, name: str, maps: dict[Path, safe_open]) -> Tensor:
        """A weight as it is stored, or what its codes stand for."""
        packing, packed = self._checkpoint.packing, self._checkpoint.packed
        if packing is None or name not in packed:
            return maps[self._entries[name].file].get_tensor(name)
        pieces = {end: maps[self._entries[part].file].get_tensor(part) for end, part in packed[name].items()}
        value = packing.unpack(pieces, *self._shapes[name])
        if not bool(value.isfinite().all()):
            raise ConfigError(
                f"the scales of {name} are no finite numbers: the checkpoint is damaged, download it again"
            )
        return value
