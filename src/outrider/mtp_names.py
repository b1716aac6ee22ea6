"""Under which names checkpoints carry heads for multi-token prediction (MTP): plain facts, for targets that leave them out and for
the drafter that reads them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layout:
    """One family's way of naming heads. root: before all tensors of one, with "{N}" for the model's number of layers plus the
    head's own, "{D}" for the head's own, from 0; without either, heads share `parts`, and each has a decoder layer.

    every: a pattern of the beginnings of all heads' tensors; a group is the number of a layer that the model itself may have.
    parts: norm of the token, norm of the hidden state, product of both, last norm. layer: before the decoder layer's tensors,
    behind the root, with "{D}" likewise. hidden_first: the product reads [hidden state, token]. shifted: norms multiply by
    1 + weight.
    """

    root: str
    every: str
    parts: tuple[str, str, str, str]
    layer: str = ""
    hidden_first: bool = False
    shifted: bool = False

    def begins(self, layers: int, head: int = 0) -> str:
        """The root of a head of a model with so many layers."""
        return self.root.replace("{N}", str(layers + head)).replace("{D}", str(head))

    def inner(self, layers: int, head: int = 0) -> str:
        """Before the tensors of a head's decoder layer."""
        return self.begins(layers, head) + self.layer.replace("{D}", str(head))

    def required(self, layers: int, head: int = 0) -> tuple[str, ...]:
        """The names of `parts` in the files."""
        return tuple(f"{self.begins(layers, head)}{part}.weight" for part in self.parts)

    def heads(self, names: Collection[str], layers: int) -> int:
        """How many heads there are among a checkpoint's tensors, up to the first that is not whole."""
        have, found, dots = set(names), 0, self.inner(layers).count(".")
        inner = {".".join(name.split(".", dots)[:dots]) + "." for name in have}
        while have.issuperset(self.required(layers, found)) and (not found or self.inner(layers, found) in inner):
            found += 1
        return found


LAYOUTS: Mapping[str, Layout] = {
    "deepseek": Layout(
        "model.layers.{N}.", r"model\.layers\.(\d+)\.", ("enorm", "hnorm", "eh_proj", "shared_head.norm")
    ),
    "mimo": Layout(
        "model.mtp_layers.{D}.",
        r"model\.mtp_layers\.\d+\.",
        ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
        hidden_first=True,
    ),
    "qwen3_next": Layout(
        "mtp.",
        r"mtp\.",
        ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
        layer="layers.{D}.",
        shifted=True,
    ),
}
"""DeepSeek-V3 and R1, GLM-4.5; MiMo; Qwen3-Next and Qwen3.5."""


def layout_in(names: Collection[str], layers: int) -> Layout | None:
    """The layout of the heads among a checkpoint's tensors, None if there are none. layers: of the model."""
    have = set(names)
    return next((layout for layout in LAYOUTS.values() if have.issuperset(layout.required(layers))), None)


def head_tensors(names: Collection[str], layers: int) -> set[str]:
    """The tensors of all MTP heads of a checkpoint."""
    layout = layout_in(names, layers)
    if layout is None:
        return set()
    found = ((name, re.match(layout.every, name)) for name in names)
    return {name for name, match in found if match and all(int(n) >= layers for n in match.groups())}
