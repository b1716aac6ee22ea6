"""Mixtures of experts in checkpoints: their keys in `config.json` and the names of their tensors.

Checkpoints hold every expert by itself; transformers 5 may also write all experts of a layer as one tensor, and GGUF files have a
tensor each of all gates, ups and downs of a layer. All are read.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from outrider.config_keys import flag, real, whole
from outrider.errors import ConfigError
from outrider.models.decoder import DecoderConfig, Experts
from outrider.models.expert_keys import GAIN, LIMIT, PLACES, ExpertKeys
from outrider.models.families import Unsupported

MOST = 1024
"""Most experts of a layer; the largest known models have 512."""


def read_experts(raw: dict, keys: ExpertKeys, layers: int, inner: int, where: object) -> Experts:
    """The experts that a configuration describes. Raises ConfigError for wrong values, Unsupported for a model without experts."""
    names = [name for name in ("num_experts", "num_local_experts") if raw.get(name) is not None]
    if len(names) == 2 and raw[names[0]] != raw[names[1]]:
        raise Unsupported(f"num_experts and num_local_experts differ ({raw[names[0]]!r:.20}, {raw[names[1]]!r:.20})")
    count = whole(raw, names[0] if names else "num_experts", where, default=keys.count, most=MOST)
    used = whole(raw, "num_experts_per_tok", where, default=keys.used, most=MOST)
    if used > count:
        raise ConfigError(
            f"{where}: num_experts_per_tok ({used}) exceeds the number of experts ({count}): correct the file"
        )
    sparse = _sparse(raw, layers, where) if keys.steps else (True,) * layers
    if not any(sparse):
        raise Unsupported("decoder_sparse_step and mlp_only_layers leave no layer with experts")
    return Experts(
        count=count,
        used=used,
        inner=inner if keys.inner is None else whole(raw, keys.inner[0], where, default=keys.inner[1], most=1 << 20),
        normalised=flag(raw, "norm_topk_prob", where) if keys.normalised is None else keys.normalised,
        sparse=sparse,
        limit=real(raw, "swiglu_limit", where, LIMIT, most=1e6) if keys.bounded else 0.0,
        gain=real(raw, "swiglu_alpha", where, GAIN, most=1e6) if keys.bounded else 1.0,
        shared=0 if keys.shared is None else whole(raw, keys.shared[0], where, default=keys.shared[1], most=1 << 20),
    )


def _sparse(raw: dict, layers: int, where: object) -> tuple[bool, ...]:
    step = whole(raw, "decoder_sparse_step", where, default=1, most=1 << 20)
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in dense):
        raise ConfigError(
            f"{where}: mlp_only_layers must be a list of layers, got {reprlib.repr(dense)}: correct the file"
        )
    without = frozenset(dense)
    return tuple(i not in without and (i + 1) % step == 0 for i in range(layers))


Held = Literal["each", "fused", "stacked"]
"""How a layer's experts lie in files: every expert by itself; gates and ups of all in one tensor, downs in another; or a tensor
each of all gates, ups and downs, as in GGUF."""
FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
STACKED = ("mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight", "mlp.experts.down_proj.weight")


SHARED = {
    "shared_gate_up": ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
    "shared_down": ("mlp.shared_expert.down_proj.weight",),
    "shared_gate": ("mlp.shared_expert_gate.weight",),
}
"""The fields of `LayerWeights` of the expert that every row uses -> their tensors."""


def _shared_shapes(config: DecoderConfig, held: Held) -> dict[str, tuple[int, ...]]:
    """Of the expert that every row uses; files of GGUF have its gate as a list of numbers."""
    units = 0 if config.experts is None else config.experts.shared
    if not units:
        return {}
    (gate, up), (down,), (of_rows,) = SHARED.values()
    shapes = dict.fromkeys((gate, up), (units, config.hidden)) | {down: (config.hidden, units)}
    return shapes | {of_rows: (config.hidden,) if held == "stacked" else (1, config.hidden)}


def block_shapes(config: DecoderConfig, held: Held) -> dict[str, tuple[int, ...]]:
    """Name within its block, and shape, of every tensor of a layer's experts and router."""
    return _routed_shapes(config, held) | _shared_shapes(config, held)


def _routed_shapes(config: DecoderConfig, held: Held) -> dict[str, tuple[int, ...]]:
    e, keys = config.experts, PLACES[config.family]
    assert e is not None
    router, up, down = (e.count, config.hidden), (e.count, e.inner, config.hidden), (e.count, config.hidden, e.inner)
    if held == "stacked":
        out = {router_name(config, held): router, **dict(zip(STACKED, (up, up, down), strict=True))}
        return out | ({bias_of(name): shape[:-1] for name, shape in out.items()} if keys.bounded else {})
    if held == "fused":
        both = (e.count, 2 * e.inner, config.hidden)
        out = {router_name(config, held): router, **dict(zip(FUSED, (both, down), strict=True))}
        if not keys.bounded:
            return out
        biases = (e.count,), both[:2], down[:2]
        turned = {name: shape if len(shape) == 2 else (shape[0], shape[2], shape[1]) for name, shape in out.items()}
        return turned | dict(zip(map(bias_of, out), biases, strict=True))
    gates, ups, downs = keys.parts
    each = {gates: up[1:], ups: up[1:], downs: down[1:]}
    out = {expert_name(config, i, part): shape for i in range(e.count) for part, shape in each.items()}
    return {router_name(config, held): router} | out


def bias_of(name: str) -> str:
    """The name of the bias that belongs to a weight."""
    return f"{name.removesuffix('.weight')}.bias" if name.endswith(".weight") else f"{name}_bias"


def router_name(config: DecoderConfig, held: Held) -> str:
    keys = PLACES[config.family]
    if keys.bounded and held != "stacked":
        return "mlp.router.weight"
    return f"{keys.place if held == 'each' else 'mlp'}.gate.weight"


def expert_name(config: DecoderConfig, i: int, part: str) -> str:
    return f"{PLACES[config.family].place}.experts.{i}.{part}.weight"


def expert_names(config: DecoderConfig, fused: bool) -> dict[str, tuple[str, ...]]:
    """The fields of `LayerWeights` that are made of a sparse layer's tensors -> their names within the block, in order."""
    assert config.experts is not None
    router = {"router": (router_name(config, "fused" if fused else "each"),)} | (
        SHARED if config.experts.shared else {}
    )
    if fused:
        out = router | {"gate_up": FUSED[:1], "down": FUSED[1:]}
        biases = {f"{field}_bias": (bias_of(names[0]),) for field, names in out.items() if field not in SHARED}
        return out | (biases if PLACES[config.family].bounded else {})
    gate, up, down = PLACES[config.family].parts
    of = lambda part: tuple(expert_name(config, i, part) for i in range(config.experts.count))  # type: ignore[union-attr]  # noqa: E731
    return router | {"gate_up": of(gate) + of(up), "down": of(down)}


@dataclass(frozen=True, slots=True)
class Order:
    """How a tensor of all experts of a layer lies in its file, beside its place in `LayerWeights`.

    split: the dimension of the file that is gates and ups, None where there are downs; turns: whether these take turns in it. Gates
    and ups are a dimension of their own then. dims: the file's dimensions in the order of `LayerWeights`, which has the first
    `outputs` of them as one.
    """

    dims: tuple[int, ...]
    outputs: int
    split: int | None = None
    turns: bool = False

    def memory(self, shape: tuple[int, ...], empty: Callable[[Sequence[int]], Tensor]) -> tuple[Tensor, Tensor]:
        """New memory for a tensor of the file's shape: as it is in `LayerWeights`, and the same as it is in the file."""
        at = self.split
        if at is not None:
            both = (shape[at] // 2, 2) if self.turns else (2, shape[at] // 2)
            shape = (*shape[:at], *both, *shape[at + 1 :])
        out = empty([shape[i] for i in self.dims])
        return out.flatten(0, self.outputs - 1), out.permute([self.dims.index(i) for i in range(len(shape))])


_ORDERS = {"gate_up": Order((1, 0, 2, 3), 3, 1), "down": Order((0, 1, 2), 2)}
_TURNED = {
    "gate_up": Order((3, 0, 2, 1), 3, 2, turns=True), "gate_up_bias": Order((2, 0, 1), 3, 1, turns=True),
    "down": Order((0, 2, 1), 2), "down_bias": Order((0, 1), 2),
}  # fmt: skip
"""gpt-oss's: gates and ups take turns, and inputs come before outputs."""


def order_of_experts(field: str, name: str, keys: ExpertKeys | None) -> Order | None:
    """How the tensor `name` that becomes a field of `LayerWeights` lies in its file; None for one of a single expert or layer."""
    if keys is None or not name.removesuffix("_bias").endswith(FUSED):
        return None
    return (_TURNED if keys.bounded else _ORDERS).get(field)
