"""Copies tensors of safetensors files into memory of their own: fused as layers have them, in one type, on one device.

Files are mapped again for each group of tensors: an open map keeps every page it has read in memory, so reading a file through
one map would hold the weights twice. Here the peak is the weights plus one block (or one embedding); what is computed from codes,
and tensors that hold all experts of a layer, are there an expert at a time.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from outrider.errors import ConfigError
from outrider.models.adapter import Adapter
from outrider.models.config import SINKS, Layout
from outrider.models.decoder import LayerWeights
from outrider.models.entries import Entry
from outrider.models.experts import expert_names, order_of_experts
from outrider.models.packed import Packing
from outrider.models.rotary import halves
from outrider.nn.large_pages import LargePages

Progress = Callable[[float], None]
"""Called with the share of the weights read so far, in (0, 1]."""
Names = tuple[str, ...]
Maps = Mapping[Path, safe_open]
_CPU = torch.device("cpu")


@runtime_checkable
class Source(Protocol):
    """What is known of a checkpoint before its weights are read (`checkpoint.Checkpoint`).

    entries: of its files. packed: the tensors of every packed weight, by their ends. fused: all experts of a layer lie in one.
    """

    entries: dict[str, Entry]
    packing: Packing | None
    packed: dict[str, dict[str, str]]
    adapter: Adapter | None
    layout: Layout
    fused: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight."""
        ...


class Reader:
    """Reads weights of a source. wanted: all that will be read, for the progress. dtype, device: of what is made. memory: where
    that goes if it stays together; None: each tensor in memory of its own, so that it can be let go of alone."""

    def __init__(
        self,
        source: Source,
        wanted: Sequence[str],
        dtype: torch.dtype,
        device: torch.device = _CPU,
        progress: Progress | None = None,
        memory: LargePages | None = None,
    ) -> None:
        self._source, self._dtype, self._device, self._progress = source, dtype, device, progress
        self._entries, self._shapes = source.entries, source.shapes
        self._empty = torch.empty if memory is None else memory.empty
        self._done, self._all = 0, sum(self._entries[part].bytes for name in wanted for part in self._pieces(name))

    def tensor(self, name: str) -> Tensor:
        """A weight, as it is stored."""
        return self._group({"": (name,)})[""]

    def parts(self, name: str) -> Iterator[Tensor]:
        """The same along its first dimension, see `Checkpoint.parts`."""
        with self._maps([name]) as maps:
            for value in self._values(name, maps):
                yield value.to(self._device, self._dtype)

    def layer(self, i: int) -> LayerWeights:
        """Block i."""
        layout = self._source.layout
        family, c = layout.family, layout.decoder
        names = self._names(i)
        t = self._group(names)
        turned, count = (c.heads + c.kv_heads) * c.head_dim, 2 * len(c.inv_freq)
        for rows in (t[name][:turned] for name in ("qkv", "qkv_bias") if name in t and family.interleaved):
            rows.copy_(halves(rows.view(turned, -1), c.heads + c.kv_heads, c.head_dim, count).view(rows.shape))
        return LayerWeights(**{f.name: t.get(f.name) for f in fields(LayerWeights)})  # type: ignore[arg-type]

    def _names(self, i: int) -> dict[str, Names]:
        """The fields of `LayerWeights` that block i has -> the weights of which they are made, one below the other."""
        layout = self._source.layout
        family, c = layout.family, layout.decoder
        block, attention, mlp = f"model.layers.{i}.", f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        heads = ("qkv",) if "qkv" in family.fused else tuple("qkv")
        gate_up = ("gate_up",) if "gate_up" in family.fused else ("gate", "up")
        names: dict[str, Names] = {
            "qkv": tuple(f"{attention}{part}_proj.weight" for part in heads),
            "o": (f"{attention}o_proj.weight",),
            "gate_up": tuple(f"{mlp}{part}_proj.weight" for part in gate_up),
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
        if c.experts is not None and c.experts.sparse[i]:
            found = expert_names(c, self._source.fused)
            names |= {field: tuple(block + name for name in parts) for field, parts in found.items()}
        return names

    def _pieces(self, name: str) -> Sequence[str]:
        """The tensors in the files that a weight is made of."""
        return list(self._source.packed[name].values()) if name in self._source.packed else [name]

    def _group(self, wanted: Mapping[str, Names]) -> dict[str, Tensor]:
        """Weights by their fields, those of several names one below the other."""
        with self._maps([name for names in wanted.values() for name in names]) as maps:
            return {field: self._fuse(field, names, maps) for field, names in wanted.items()}

    @contextmanager
    def _maps(self, names: Sequence[str]) -> Iterator[Maps]:
        """The files of some weights. Raises ConfigError where one cannot be read."""
        files = {self._entries[piece].file for name in names for piece in self._pieces(name)}
        try:
            with ExitStack() as stack:
                yield {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"a weight file cannot be read ({reprlib.repr(str(error))}): download it again") from None

    def _fuse(self, field: str, names: Names, maps: Maps) -> Tensor:
        shapes = [self._shapes[name] for name in names]
        family, norm = self._source.layout.family, names[0].endswith("norm.weight")
        dtype = torch.promote_types(self._dtype, torch.float32) if norm and family.wide_norms else self._dtype
        empty = partial(self._empty, dtype=dtype, device=self._device)
        order = order_of_experts(field, names[0], family.experts)
        if order is None:
            out = empty((sum(s[0] for s in shapes), *shapes[0][1:]))
            stored = list(out.split([s[0] for s in shapes]))
        else:
            out, one = order.memory(shapes[0], empty)
            stored = [one]
        for name, part in zip(names, stored, strict=True):
            places = part if len(self._shapes[name]) == 3 else [part]
            for place, value in zip(places, self._values(name, maps), strict=True):
                place.copy_(value.view(place.shape))
            self._done += sum(self._entries[piece].bytes for piece in self._pieces(name))
            if self._progress:
                self._progress(self._done / self._all)
        return out.add_(1) if norm and family.shifted else out

    def _values(self, name: str, maps: Maps) -> Iterator[Tensor]:
        """A weight as it is stored or what its codes stand for, with what an adapter adds to it; an expert at a time."""
        packing, adapter = self._source.packing, self._source.adapter
        found = {
            end: maps[self._entries[piece].file].get_tensor(piece)
            for end, piece in self._source.packed.get(name, {"": name}).items()
        }
        for e in range(self._shapes[name][0]) if len(self._shapes[name]) == 3 else [None]:
            mine = found if e is None else {end: tensor[e : e + 1] for end, tensor in found.items()}
            if packing is None or name not in self._source.packed:
                value = mine[""]
            else:
                shape = self._shapes[name]
                value = packing.unpack(mine, *(shape if e is None else (1, *shape[1:])))
                _check_finite(name, value)
            value = value if e is None else value[0]
            yield value if adapter is None else adapter.added(name, value)


def _check_finite(name: str, value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise ConfigError(f"the scales of {name} are no finite numbers: the checkpoint is damaged, download it again")
