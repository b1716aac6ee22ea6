"""Finds what a Hugging Face model requires of its attention, by an attention function that only records its arguments.

It shows whether all layers attend through transformers' `AttentionInterface`, and how, and whether the rotary frequencies of
a call depend on its longest position (dynamic and long-range scaling), which is not allowed for rows that share a call, or a
cache, with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

_RECORD = "outrider_record"
_IMPLEMENTATION = "_attn_implementation_internal"
"""Where a configuration of transformers keeps the name of its attention."""
_OBEYED = frozenset({"scaling", "sliding_window", "softcap", "s_aux", "is_causal", "dropout"})
"""Arguments that our attention uses."""
_HARMLESS = frozenset({"outrider", "position_ids", "use_cache", "return_dict", "output_router_logits"})
"""Arguments that do not change what is attended to. All other non-empty ones must be our positions under another name."""


class AttentionInterfaceUnsupported(Exception):
    """Why a model cannot be driven through the attention interface; never reaches the user as an error."""


class _Heard(Exception):
    """Ends a call when the requested layer was recorded; never reaches the user."""


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one attention layer. unknown: keyword arguments that may change what is attended to."""

    layer: int
    groups: int
    head_dim: int
    window: int
    dtype: torch.dtype
    unknown: tuple[str, ...]
    query: Float[Tensor, "h n D"]


@dataclass(slots=True)
class _Listener:
    """position: of the rows of the call. last: number of layers after which to stop; None: all."""

    position: Tensor
    last: int | None = None
    calls: list[Call] = field(default_factory=list)

    def hear(self, call: Call) -> None:
        self.calls.append(call)
        if len(self.calls) == self.last:
            raise _Heard


def _inert(value: Any, position: Tensor) -> bool:
    """Whether an argument has no effect: None, False, zero, empty, or the positions of the rows again."""
    if isinstance(value, Tensor):
        return value.numel() == position.numel() and bool((value.flatten() == position).all())
    return value is None or (isinstance(value, bool | int | float | str | tuple | list | dict) and not value)


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The registered attention function that only records."""
    listener: _Listener | None = kwargs.get("outrider")
    if listener is None:
        raise AttentionInterfaceUnsupported("it does not hand keyword arguments on to its attention")
    asked = {name: given for name, given in kwargs.items() if name not in _OBEYED | _HARMLESS}
    unknown = [name for name, given in asked.items() if not _inert(given, listener.position)]
    if attention_mask is not None:
        unknown.append("attention_mask")
    if kwargs.get("is_causal") is False:
        unknown.append("is_causal=False")
    if query.shape[2] != key.shape[2]:
        unknown.append("keys of other rows")
    head_dim = max(key.shape[-1], value.shape[-1])
    window, layer = kwargs.get("sliding_window") or 0, int(module.layer_idx)  # type: ignore[arg-type]
    listener.hear(Call(layer, key.shape[1], head_dim, window, key.dtype, tuple(unknown), query[0]))
    return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register(_RECORD, _record)


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations that set the attention of the model's parts, each once. It visits every module: not for every step."""
    found: dict[int, PreTrainedConfig] = {}
    left = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while left:
        config = left.pop()
        if id(config) not in found:
            found[id(config)] = config
            parts = [getattr(config, name, None) for name in config.sub_configs]
            left += [part for part in parts if isinstance(part, PreTrainedConfig)]
    return list(found.values())


def attention_of(model: PreTrainedModel, implementation: str) -> AbstractContextManager[None]:
    """Context in which the model uses another attention; afterwards it has its own again."""
    return AttentionSwitch(configs_of(model), implementation)


class AttentionSwitch:
    """`attention_of` a model whose configurations are known, to be entered any number of times, also inside itself.

    It is written where the property keeps it: the property's own setter visits all parts each time, which for a small model is a
    tenth of a step.
    """

    def __init__(self, configs: Sequence[PreTrainedConfig], implementation: str) -> None:
        self._held = [vars(config) for config in configs]
        self._name, self._implementation, self._before = _IMPLEMENTATION, implementation, list[list[Any]]()
        if not all(_IMPLEMENTATION in own for own in self._held):  # another release
            self._held, self._name = [_Attributes(config) for config in configs], "_attn_implementation"

    def __enter__(self) -> None:
        self._before.append([own[self._name] for own in self._held])
        for own in self._held:
            own[self._name] = self._implementation

    def __exit__(self, *_: object) -> None:
        for own, was in zip(self._held, self._before.pop(), strict=True):
            own[self._name] = was


class _Attributes:
    """An object's attributes by name, properties too."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def __getitem__(self, name: str) -> Any:
        return getattr(self._of, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._of, name, value)


@torch.no_grad()
def listen(
    model: PreTrainedModel, token: Sequence[int], position: Sequence[int], last: int | None = None
) -> list[Call]:
    """The arguments of every layer, in call order, when the model reads `token` at `position`; only the first `last` layers."""
    at = torch.tensor(list(position), device=model.device)
    heard = _Listener(at, last)
    with attention_of(model, _RECORD), suppress(_Heard):
        model(
            input_ids=torch.tensor([list(token)], device=model.device),
            position_ids=at[None],
            use_cache=False,
            outrider=heard,
        )
    return heard.calls


# ------------------------------------------------------------------------------------------------------ long positions
@dataclass(frozen=True, slots=True)
class Bend:
    """Rotary frequencies change as soon as a call reaches beyond `limit` tokens. once: they change there, and never again."""

    limit: int
    once: bool


def find_bend(model: PreTrainedModel, token: Sequence[int], length: int) -> Bend | None:
    """Where rows at the start of a text are rotated differently because a call has a row further on, up to `length` tokens.

    None: nowhere, or the model does not attend through the interface.
    """
    n = len(token)

    def queries(reach: int, last: int | None = None) -> list[Tensor]:
        """Queries of the first n rows of a call of n + 1 rows that reaches `reach` tokens: always the same products."""
        return [c.query[:, :n] for c in listen(model, [*token, token[0]], [*range(n), reach - 1], last)]

    if length <= n + 1:
        return None
    far, near = queries(length), queries(n + 1)  # near ones last: some models keep the frequencies of the longest call
    if len(far) != len(near):
        return None
    changed = next((i for i, (a, b) in enumerate(zip(far, near, strict=True)) if not _alike(a, b)), None)
    if changed is None:
        return None
    low, high = n + 1, length
    while high - low > 1:
        middle = (low + high) // 2
        queries(n + 1, changed + 1)
        if _alike(queries(middle, changed + 1)[-1], near[changed]):
            low = middle
        else:
            high = middle
    first = queries(low + 1, changed + 1)[-1]
    queries(n + 1, changed + 1)
    return Bend(low, _alike(first, far[changed]))


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding: the last row may change the batches of experts."""
    limit = 1e-4 if a.dtype in (torch.float32, torch.float64) else 0.03
    return float((a - b).abs().max()) <= limit * float(b.abs().max().clamp(min=1e-12))
