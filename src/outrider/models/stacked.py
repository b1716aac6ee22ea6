"""A checkpoint's tensors as GGUF files hold them: those of all experts of a layer in one, an expert at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from outrider.models.checkpoint import Checkpoint
from outrider.models.expert_keys import PLACES
from outrider.models.experts import FUSED, STACKED, expert_name, router_name
from outrider.models.gguf.names import ROUTER


def parts_of(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    """A tensor in float32, in parts along its first dimension. name: of `shapes_of` with experts stacked."""
    c, at = checkpoint.config, name.find("mlp.")
    block, rest = name[:at], name[at:]
    if c.experts is None or (rest not in STACKED and rest != ROUTER):
        yield checkpoint.tensor(name)
    elif rest == ROUTER:
        yield checkpoint.tensor(block + router_name(c, "fused" if checkpoint.fused else "each"))
    elif checkpoint.fused:
        gates, downs = FUSED
        whole = checkpoint.tensor(block + (downs if rest == STACKED[2] else gates))
        yield from whole if rest == STACKED[2] else whole.unflatten(1, (2, -1))[:, STACKED.index(rest)]
    else:
        part = PLACES[c.family].parts[STACKED.index(rest)]
        yield from (checkpoint.tensor(block + expert_name(c, i, part)) for i in range(c.experts.count))
