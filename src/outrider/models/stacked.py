"""A checkpoint's tensors as GGUF files hold them: those of all experts of a layer in one, an expert at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from outrider.models.checkpoint import Checkpoint
from outrider.models.expert_keys import PLACES
from outrider.models.experts import FUSED, STACKED, bias_of, expert_name, router_name
from outrider.models.gguf.names import ROUTER


def parts_of(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    """A tensor in float32, in parts along its first dimension. name: of `shapes_of` with experts stacked."""
    c, at = checkpoint.config, name.find("mlp.")
    block, rest = name[:at], name[at:]
    weight = f"{rest.removesuffix('.weight').removesuffix('.bias')}.weight"
    if c.experts is None or (weight not in STACKED and weight != ROUTER):
        yield checkpoint.tensor(name)
    elif rest != weight:
        other = router_name(c, "fused") if weight == ROUTER else FUSED[weight == STACKED[2]]
        found = checkpoint.tensor(block + bias_of(other))
        yield found if weight == ROUTER else torch.stack([_split(one, weight, True) for one in found])
    elif rest == ROUTER:
        yield checkpoint.tensor(block + router_name(c, "fused" if checkpoint.fused else "each"))
    elif checkpoint.fused:
        for one in checkpoint.parts(block + FUSED[rest == STACKED[2]]):
            yield _split(one.mT if PLACES[c.family].bounded else one, rest, PLACES[c.family].bounded)
    else:
        part = PLACES[c.family].parts[STACKED.index(rest)]
        yield from (checkpoint.tensor(block + expert_name(c, i, part)) for i in range(c.experts.count))


def _split(one: Tensor, part: str, turns: bool) -> Tensor:
    """The gates or ups of an expert's tensor [both, ...], or all of one of downs. turns: gates and ups take turns."""
    if part == STACKED[2]:
        return one
    first = STACKED.index(part)
    return one[first::2] if turns else one.chunk(2)[first]
