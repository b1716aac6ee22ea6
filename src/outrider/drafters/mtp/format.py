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

INDEX_BYTES = 64 << 20
"""Of a whole model: with many experts it names a hundred thousand tensors."""
LAYER = "layers.0."
"""Before the names of the decoder layer's tensors."""
_PARTS = ("token_norm.weight", "hidden_norm.weight", "fc.weight", "norm.weight")
_TABLES = {"embed_tokens.weight": "embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
"""Tables of the target that DeepSeek's layout repeats, behind its root."""


@dataclass(frozen=True, slots=True)
class Carried:
    """A head in a folder. config: the keys of the language model. depth: heads that there are; the first is read."""

    folder: Path
    layout: Layout
    config: dict[str, Any]
    depth: int

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the first head; those of its decoder layer begin with `LAYER`.

        Raises ConfigError for a tensor that is not stored as numbers.
        """
        layers, found = _layers(self.config), dict[str, Tensor]()
        root, parts = self.layout.begins(layers), dict(zip(self.layout.required(layers), _PARTS, strict=True))
        for name, value in _read(self.folder, root):
            rest = name.removeprefix(root)
            own = parts.get(name) or _TABLES.get(rest)
            if own is None and not rest.startswith(self.layout.layer):
                continue  # of a further head
            if not value.is_floating_point() or value.dtype.itemsize < 2:
                kind = str(value.dtype).removeprefix("torch.")
                raise ConfigError(
                    f"{self.folder}: tensor {name[:120]} of its MTP head is stored as {kind}: use the unquantized checkpoint, or "
                    "another drafter"
                )
            found[own or LAYER + rest.removeprefix(self.layout.layer)] = value
        return self._plain(found)

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
    """The MTP head of a model's folder; None where there is none. Only headers are read."""
    if not (folder / "config.json").is_file():
        return None
    raw = read_json(folder / "config.json", CONFIG_BYTES)
    text = raw.get("text_config")
    config = text if isinstance(text, dict) else raw
    layout = layout_in(_names(folder), _layers(config))
    if layout is None:
        return None
    depth = next((config[key] for key in layout.depth if isinstance(config.get(key), int)), 1)
    return Carried(folder, layout, config, max(1, depth))


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
