"""Weights rounded to blocks while they are loaded: `--quantize-target`, `--quantize-draft`.

The distribution that is declared, and kept by exact rules, is then that of the rounded model. How far it is from the model's own is
measured on text (`distance`), and whether a draft gains by it on this machine is too: instruction sets alone do not show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.errors import ConfigError, unknown_name
from outrider.models.convert import type_for
from outrider.models.decoder import ROUTERS, DecoderConfig, DecoderWeights, LayerWeights, Segments
from outrider.models.gguf.names import EMBEDDING, HEAD
from outrider.models.lean import LeanTarget
from outrider.models.native import load_native
from outrider.nn.blocks import INT8, BlockType, Segment, named, quantise
from outrider.nn.held import Rounding
from outrider.protocols import Target
from outrider.types import Draft, Rows

ROUNDS = 3
SIZES = (1, 4)
"""Rows of a forward: a draft model's step, and its catching up with what was accepted."""
CHUNK = 64
"""Rows of a forward when distances are measured."""
BLOCKS = ("qkv", "o", "gate_up", "down", "shared_gate_up", "shared_down")
"""Linears of a layer that are rounded."""
QUANTIZE = {name: name for name in ("q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "int8")} | {
    "int4": "q4_1"
}
"""What --quantize-target and --quantize-draft take -> the type of the weights."""


def quantised(w: DecoderWeights, name: str) -> DecoderWeights:
    """Plain weights in blocks of the type that `name` stands for; blocks of layers are rounded one at a time, while they are read.

    Types are those that `outrider convert` would choose; what it would write plain stays as it is. Raises ConfigError for an
    unknown name.
    """
    wanted = block_type(name)

    def linear(weight: object, kind: str = "") -> Segments:
        return (_rounded(cast(Tensor, weight), kind, wanted),)

    def layers() -> Iterator[LayerWeights]:
        for layer in w.layers:
            parts = {name: getattr(layer, name) for name in (*BLOCKS, *ROUTERS) if getattr(layer, name) is not None}
            yield replace(layer, **{n: part.float() if n in ROUTERS else linear(part) for n, part in parts.items()})

    embedding = linear(w.embedding, EMBEDDING)
    head = embedding if w.head is w.embedding else linear(w.head, HEAD)
    return replace(w, embedding=embedding, layers=layers(), head=head)


def rounding(name: str) -> Rounding:
    """How the matrices of a trained drafter are rounded to the type that `name` stands for: as those of a draft model.

    Raises ConfigError for an unknown name."""
    return Rounding(partial(_of_drafter, wanted=block_type(name)))


def _of_drafter(weight: Float[Tensor, "O I"], head: bool, wanted: BlockType) -> Segment:
    return _rounded(weight, HEAD if head else "", wanted)


def block_type(name: str) -> BlockType:
    """The type that an option names. Raises ConfigError for an unknown one."""
    if name not in QUANTIZE:
        raise ConfigError(unknown_name("quantize", name, QUANTIZE))
    return named(QUANTIZE[name])


def quantised_target(config: DecoderConfig, plain: DecoderWeights, name: str, role: str) -> LeanTarget:
    """A target with these weights, which lie on the CPU, rounded. role: "target" or "draft", as in the options' names.

    Raises ConfigError for an unknown name.
    """
    first = replace(config, layers=1, window=config.window[:1])
    block = load_native(first, replace(plain, layers=tuple(plain.layers)[:1]))[0]
    target = LeanTarget(config, quantised(plain, name))
    if block is None or target.native is None:
        return target
    new_kv = lambda: target.first_layers(1).new_kv(1, max(SIZES))  # noqa: E731
    times = seconds(target.first_layers(1).native, new_kv), seconds(block, new_kv)
    slow = slower(name, role, *times, str(target.dtype).removeprefix("torch."))
    target.notices += () if slow is None else (slow,)
    return target


def input_notices(native: bool) -> tuple[str, ...]:
    """What `input_bits` of 16 does. native: weights are multiplied as they are stored."""
    if not native:
        return (
            "input_bits 16 changes nothing here, since its weights are unpacked and no inputs rounded: leave it out",
        )
    return ("products with its weights round their inputs to 16 bits: leave input_bits out for 8, which is faster",)


def seconds(model: object, new_kv: Callable[[], object]) -> float:
    """The sum over SIZES of the least time of a forward."""
    total = 0.0
    for size in SIZES:
        rows, times = Rows.assemble([0], [[0] * size], [0], Draft.empty(1)), []
        for _ in range(ROUNDS + 1):
            kv = new_kv()
            kv.reserve(rows)  # type: ignore[attr-defined]
            start = perf_counter()
            model.forward(rows, kv)  # type: ignore[attr-defined]
            times.append(perf_counter() - start)
        total += min(times[1:])
    return total


def slower(quantize: str, role: str, quantised: float, plain: float, dtype: str) -> str | None:
    """A notice if quantised blocks took longer (in seconds) than plain ones in the native decoder."""
    if quantised <= plain:
        return None
    return (
        f"{quantize} weights make this {role} slower on this machine ({1e3 * quantised:.2g} ms a block where {dtype} ones take "
        f"{1e3 * plain:.2g} ms): leave --quantize-{role} out"
    )


class Distance(NamedTuple):
    """Means over `tokens` positions of a text. kl: of the first model's distribution from the second's, in nats. tv: total
    variation between them. agree: the share of positions with the same most likely token."""

    kl: float
    tv: float
    agree: float
    tokens: int


def distance(plain: Target, rounded: Target, tokens: list[int]) -> Distance:
    """How far `rounded` is from `plain` on a text, at temperature 1. Raises ConfigError for an empty text."""
    if not tokens:
        raise ConfigError("a distance between models needs a text of one token at least")
    p, q = (_log_probs(target, tokens) for target in (plain, rounded))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    tv = (p.exp() - q.exp()).abs().sum(-1).mean().item() / 2
    return Distance(kl, tv, (p.argmax(-1) == q.argmax(-1)).double().mean().item(), len(tokens))


def _log_probs(target: Target, tokens: list[int]) -> Float[Tensor, "n V"]:
    """Of what follows each token, given those before it; float64."""
    kv, out = target.new_kv(1, len(tokens)), []
    for at in range(0, len(tokens), CHUNK):
        part = tokens[at : at + CHUNK]
        rows = Rows.assemble([0], [part], [at], Draft.empty(1))
        every = replace(rows, scored=torch.arange(len(part)))
        out.append(target.forward(every, kv).logits.double().log_softmax(-1))
        kv.commit(rows, [()])
    return torch.cat(out)


def _rounded(weight: Float[Tensor, "O I"], kind: str, wanted: BlockType) -> Segment:
    block = type_for(kind, tuple(weight.shape), wanted)
    if block.plain:
        stored = weight if weight.dtype is torch.bfloat16 else weight.float()
        return Segment(
            named("bf16" if stored.dtype is torch.bfloat16 else "f32"), stored.contiguous().view(torch.uint8)
        )
    return Segment(block, _by_channel(weight) if block is INT8 else quantise(weight, block))


def _by_channel(weight: Float[Tensor, "O I"]) -> Tensor:
    """Rows of INT8: a scale for each."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    code = (weight.float() / scale.clamp(min=1e-30)).round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8)
    blocks = code.view(weight.shape[0], -1, INT8.values)
    scales = scale.contiguous().view(torch.uint8).view(-1, 1, 4).expand(-1, blocks.shape[1], -1)
    return torch.cat([scales, blocks], -1).flatten(1)
