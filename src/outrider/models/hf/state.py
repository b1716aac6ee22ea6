"""How a Hugging Face model passes its state from one call to the next, found by calling it.

Releases of transformers, and other models, use different names for the state (`past_key_values`, `cache_params`, `state`,
since 5.24 `cache`), and a model's `**kwargs` accept an unknown name without an error. So no name is trusted: a model is
called once, its output is fed back, and the right argument and field are those with which a call of one further token
gives the logits of the whole text.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from outrider.errors import CapabilityError

_NEVER_STATE = ("loss", "logits", "hidden_states", "attentions", "router_logits", "aux_loss")
_GIVEN, _KEPT = "given", "kept"
_ROWS, _POSITIONS = "logits_to_keep", "position_ids"
_PLAIN = frozenset(
    """bool int float str None NoneType Optional Union typing torch Tensor LongTensor FloatTensor BoolTensor
    IntTensor""".split()  # noqa: SIM905
)


Choice = Tensor | int
"""Rows to score: their numbers [s], or how many of the last ones (at least one), which takes a view instead of an index."""


def chosen(logits: Float[Tensor, "n V"], scored: Choice) -> Float[Tensor, "s V"]:
    """The scored rows of a call that computed all."""
    return logits[-scored:] if isinstance(scored, int) else logits[scored]


@dataclass(frozen=True, slots=True)
class Handover:
    """One way of passing a model its state and getting it back.

    argument: of forward, takes the state. returned: field of the output with the state. fresh: makes the first state
    (None: the model does). extra: other arguments of a call. rows: forward can compute the logits of given rows alone.
    positions: forward is passed the tokens' positions, as by `generate`; some models count from 0 in every call.
    kept: attributes of modules that hold a part of the state between calls; then a state is a dictionary of the object that is
    given, which the model writes into and does not return, and of these.
    """

    argument: str
    returned: str
    fresh: Callable[[], Any]
    extra: dict[str, Any] = field(default_factory=dict)
    rows: bool = False
    positions: bool = False
    kept: tuple[tuple[nn.Module, str], ...] = ()

    def call(
        self, model: PreTrainedModel, token: Tensor, state: Any, scored: Choice, at: int = 0
    ) -> tuple[Float[Tensor, "s V"], Any]:
        """Logits of the rows `scored` of `token` [n], and the state after them. `state` None: the model makes the first.

        at: tokens that `state` has seen.
        """
        if self.kept:
            with self._placed(state):
                logits, _ = replace(self, kept=()).call(model, token, state[_GIVEN], scored, at)
                return logits, {_GIVEN: state[_GIVEN], _KEPT: [getattr(module, name) for module, name in self.kept]}
        given: dict[str, Any] = {} if state is None else {self.argument: state}
        if self.positions:
            given[_POSITIONS] = torch.arange(at, at + len(token), device=token.device)[None]
        out = model(input_ids=token[None], **given, **named_rows(scored if self.rows else None), **self.extra)
        logits = out.logits[0]
        return (logits if self.rows else chosen(logits, scored)), out[self.returned] if self.returned else state

    @contextmanager
    def _placed(self, state: Any) -> Iterator[None]:
        """The modules have this state; afterwards what they had before."""
        before = [getattr(module, name) for module, name in self.kept]
        try:
            for (module, name), value in zip(self.kept, state[_KEPT], strict=True):
                setattr(module, name, value)
            yield
        finally:
            for (module, name), value in zip(self.kept, before, strict=True):
                setattr(module, name, value)


def accepts(model: PreTrainedModel, name: str) -> bool:
    """Whether the model's forward names this argument (one that goes into its `**kwargs` may be ignored there)."""
    return name in inspect.signature(model.forward).parameters


def keeping(model: PreTrainedModel, state: bool) -> dict[str, bool]:
    """The arguments that make the model return a state, or none."""
    known = inspect.signature(model.forward).parameters.values()
    takes = any(p.name == "use_cache" or p.kind is inspect.Parameter.VAR_KEYWORD for p in known)
    return {"use_cache": state} if takes else {}


def named_rows(scored: Choice | None) -> dict[str, Tensor | slice]:
    """The arguments to compute the logits of these rows alone, if it can (`scores_rows`); None: of all.

    The last ones are a slice: a number is how `generate` asks, and by that Gemma 4 leaves other rows out of its last layers too.
    """
    return {} if scored is None else {_ROWS: slice(-scored, None) if isinstance(scored, int) else scored}


@torch.no_grad()
def scores_rows(model: PreTrainedModel, token: Sequence[int]) -> bool:
    """Whether forward computes exactly the logits of the requested rows, in their order, by numbers and as the last ones."""
    if not accepts(model, _ROWS) or len(token) < 3:
        return False
    inputs = torch.tensor([list(token)], device=model.device)
    try:
        for rows, count in ((torch.tensor([2, 0], device=model.device), 2), (2, 2)):
            if model(input_ids=inputs, **named_rows(rows)).logits.shape[1] != count:
                return False
    except (TypeError, IndexError, ValueError, RuntimeError):
        return False
    return True


def croppable() -> Cache:
    """A cache for any number of layers of keys and values. Without the model's configuration no layer drops rows outside its
    window, so that every layer can be cropped."""
    return DynamicCache()


@torch.no_grad()
def find_handover(
    model: PreTrainedModel,
    token: Sequence[int],
    agrees: Callable[[Tensor, int], bool],
    makers: Sequence[Callable[[], Any]],
) -> Handover:
    """The way to pass states made by one of `makers` (tried in order; None leaves it to the model) through this model.
    agrees(logits [1, V], at): whether these are the logits of row `at` of `token`.

    Raises CapabilityError, with the reason of the last attempt, if the model keeps no state.
    """
    extra, rows, fault = keeping(model, True), scores_rows(model, token), "it returns no state that it takes back"
    inputs = torch.tensor(list(token), device=model.device)
    half, last = len(token) // 2, torch.zeros(1, dtype=torch.int64, device=model.device)
    for maker in makers:
        for way in _placed(model, _ways(model, inputs[:half], maker, extra, rows)):
            try:
                _, state = way.call(model, inputs[:half], way.fresh(), last)
                logits, again = way.call(model, inputs[half : half + 1], state, last, half)
            except torch.OutOfMemoryError:
                raise
            except Exception as failure:  # an argument that is not for a state may raise anything
                fault = f"its {way.argument} takes no state: {brief(failure)}"
                continue
            if agrees(logits, half) and (again is state or not isinstance(state, Cache)):
                return way
            fault = f"its {way.argument} does not carry the text from call to call"
    raise CapabilityError(fault)


def _ways(
    model: PreTrainedModel, inputs: Tensor, maker: Callable[[], Any], extra: dict[str, Any], rows: bool
) -> Iterator[Handover]:
    """Arguments and fields that may be the state's, likely ones first."""
    given = maker()
    arguments = _arguments(model)
    if given is None:
        out = model(input_ids=inputs[None], **extra)
        fields = [n for n in out if n not in _NEVER_STATE and not isinstance(out[n], Tensor)]
        for name in sorted(fields, key=lambda n: not isinstance(out[n], Cache)):
            for argument in sorted(arguments, key=lambda a: a != name):
                yield Handover(argument, name, maker, extra, rows)
        return
    for argument in arguments:
        given = maker()
        try:
            out = model(input_ids=inputs[None], **{argument: given}, **extra)
        except Exception:  # not for a cache; `find_handover` reports the result of the likeliest argument
            continue
        for name in out:
            if out[name] is given:  # our object came back: the model wrote into it
                yield Handover(argument, name, maker, extra, rows)
        if not any(out[name] is given for name in out) and (kept := _written(model, inputs, argument, maker, extra)):
            empty = [None] * len(kept)
            yield Handover(
                argument, "", lambda kept=empty: {_GIVEN: maker(), _KEPT: list(kept)}, extra, rows, kept=kept
            )


def _written(
    model: PreTrainedModel, inputs: Tensor, argument: str, maker: Callable[[], Any], extra: dict[str, Any]
) -> tuple[tuple[nn.Module, str], ...]:
    """Attributes of the model's modules that hold another tensor after a call: a state that is not handed over (RecurrentGemma)."""

    def held() -> dict[tuple[nn.Module, str], Tensor]:
        return {
            (m, name): value for m in model.modules() for name, value in vars(m).items() if isinstance(value, Tensor)
        }

    before = held()
    model(input_ids=inputs[None], **{argument: maker()}, **extra)
    return tuple(place for place, value in held().items() if before.get(place) is not value)


def _placed(model: PreTrainedModel, ways: Iterator[Handover]) -> Iterator[Handover]:
    """Each way, first with positions if forward takes them: half precision is too coarse to show that they are missing."""
    takes_positions = accepts(model, _POSITIONS)
    for way in ways:
        if takes_positions:
            yield replace(way, positions=True)
        yield way


def _arguments(model: PreTrainedModel) -> list[str]:
    """Optional arguments of forward whose type may be a state's, those named like a cache first."""
    known = inspect.signature(model.forward).parameters.values()
    optional = [p for p in known if p.default is None and not _plain(p.annotation) and p.name not in _NEVER_STATE]
    return [p.name for p in sorted(optional, key=lambda p: "Cache" not in str(p.annotation))]


def _plain(annotation: Any) -> bool:
    """Whether an argument of this type is a number, text or one tensor, and not a state. Without a type it may be anything."""
    if annotation is inspect.Parameter.empty:
        return False
    words = set(
        re.findall(r"\w+", getattr(annotation, "__name__", "") if isinstance(annotation, type) else str(annotation))
    )
    return words <= _PLAIN


def brief(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200].rstrip(".")
