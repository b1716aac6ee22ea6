"""MTP heads in the checkpoints of models, in the layout of each family.

What is read has `MtpHead`'s names, with the token first in the product, and norms that multiply by their weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from outrider.drafters.checkpoint import CONFIG_BYTES, weight_files
from outrider.errors import ConfigError
from outrider.files import read_json, read_weight_map
from outrider.mtp_names import Layout, layout_in
from outrider.nn.blocks.float8 import scaled_blocks

INDEX_BYTES = 64 << 20
"""Of a whole model: with many experts it names a hundred thousand tensors."""
LAYER = "layers.0."
"""Before the names of the decoder layer's tensors."""
_SCALES = "_scale_inv"
"""Behind the name of a tensor in float8: the scales of its blocks."""
_PARTS = ("token_norm.weight", "hidden_norm.weight", "fc.weight", "norm.weight")
_TABLES = {"embed_tokens.weight": "embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
"""Tables of the target that DeepSeek's layout repeats, behind its root."""


@dataclass(frozen=True, slots=True)
class Carried:
    """Heads in a folder. config: the keys of the language model. depth: heads that there are. block: rows and columns that share a
    scale in float8."""

    folder: Path
    layout: Layout
    config: dict[str, Any]
    depth: int
    block: tuple[int, int]

    def tensors(self, head: int = 0) -> dict[str, Tensor]:
        """All tensors of a head, from 0; those of its decoder layer begin with `LAYER`. Float8 with scales by blocks becomes
        bfloat16.

        Raises ConfigError for a tensor that is not stored as numbers.
        """
        layers, found = _layers(self.config), dict[str, Tensor]()
        root, inner = self.layout.begins(layers, head), self.layout.inner(layers, head)
        parts = dict(zip(self.layout.required(layers, head), _PARTS, strict=True))
        stored = dict(_read(self.folder, root))
        for name, value in stored.items():
            own = parts.get(name) or _TABLES.get(name.removeprefix(root))
            if (own is None and not name.startswith(inner)) or name.endswith(_SCALES):
                continue  # of a further head, or read with what it scales
            found[own or LAYER + name.removeprefix(inner)] = self._numbers(name, value, stored.get(name + _SCALES))
        return self._plain(found)

    def _numbers(self, name: str, value: Tensor, scales: Tensor | None) -> Tensor:
        """A tensor as it is multiplied."""
        if value.dtype == torch.float8_e4m3fn and scales is not None and value.ndim == 2:
            down, across = self.block
            if scales.shape == (-(-value.shape[0] // down), -(-value.shape[1] // across)):
                return scaled_blocks(value, scales, down, across).bfloat16()
        if value.is_floating_point() and value.dtype.itemsize >= 2 and scales is None:
            return value
        kind = str(value.dtype).removeprefix("torch.")
        raise ConfigError(
            f"{self.folder}: tensor {name[:120]} of its MTP head is stored as {kind}, without scales of blocks that fit it: use "
            "the unquantized checkpoint, or another drafter"
        )

    def _plain(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The norms and the product as `MtpHead` computes them; the layer's own norms are its family's business.

        What an index names and no file has is left to `checkpoint.fill` to refuse.
        """
        product = found.get("fc.weight")
        if self.layout.hidden_first and product is not None and product.ndim == 2:
            found["fc.weight"] = torch.cat(product.chunk(2, 1)[::-1], 1)
        if self.layout.shifted:
            found |= {name: found[name].float() + 1 for name in _PARTS if "norm" in name and name in found}
        return found


def carried(folder: Path) -> Carried | None:
    """The MTP heads of a model's folder; None where there is none. Only headers are read."""
    if not (folder / "config.json").is_file():
        return None
    raw = read_json(folder / "config.json", CONFIG_BYTES)
    text = raw.get("text_config")
    config = text if isinstance(text, dict) else raw
    names, layers = _names(folder), _layers(config)
    layout = layout_in(names, layers)
    if layout is None:
        return None
    return Carried(folder, layout, config, layout.heads(names, layers), _block(raw, folder))


def _block(raw: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    """Rows and columns of a block of float8, as config.json has them; 128 by 128 where it does not say."""
    how = raw.get("quantization_config")
    block = how.get("weight_block_size") if isinstance(how, dict) else None
    if block is None:
        return 128, 128
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise ConfigError(
            f"{folder / 'config.json'}: weight_block_size must be two whole numbers above 0, got {str(block)[:60]}"
        )
    return block[0], block[1]


def _layers(config: Mapping[str, Any]) -> int:
    layers = config.get("num_hidden_layers")
    return layers if isinstance(layers, int) and not isinstance(layers, bool) else -1


def _names(folder: Path) -> set[str]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        with _opened(single) as file:
            return set(file.keys())
    return set(read_weight_map(index, INDEX_BYTES)) if index.is_file() else set()


def _read(folder: Path, root: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors whose names begin with `root`."""
    for weights in weight_files(folder, INDEX_BYTES):
        with _opened(weights) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name.startswith(root):
                    yield name, file.get_tensor(name)


def _opened(weights: Path) -> Any:
    try:
        return safe_open(weights, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{weights} cannot be read ({error}): download it again") from None
