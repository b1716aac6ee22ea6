"""The options of an engine: plain values, checked on construction. Objects (a model, a drafter, a rule) are arguments of
`build_engine`, not options."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from inspect import Parameter, get_annotations, signature
from typing import Any, SupportsFloat, TypedDict, TypeVar, get_args, no_type_check

from outrider.errors import CapabilityError, ConfigError, unknown_name

_LEAST = {"length": 0, "slots": 1, "chunk": 1, "max_length": 1, "input_bits": 8}
"""The least value of each whole-number option."""
WITHOUT_MODEL: Mapping[str, str] = {
    "ngram": r"(?::[^+/]*)?",
    "prediction": "",
    "forced": r"(?::\d{0,4})?",
    "suffix": r"(?::shared)?",
    "recycle": r"(?::[\dx]{0,64})?",
}
"""The drafters that need no model, by the name that `--draft` gives them, and what may stand behind it."""
PART = re.compile(f"({'|'.join(name + options for name, options in WITHOUT_MODEL.items())})(\\+|$)")
"""One of them at the start of a --draft, and the '+' behind it, which another drafter follows."""
DRAFTERS = ("none", "auto", *WITHOUT_MODEL, "jacobi", "early", "sparse")
"""What a --draft may name besides folders, GGUF files, Hub names and kinds of trained drafters."""
OF_THE_TARGET = ("early", "sparse")
"""Drafters that are parts of the target: they read its layers or its cache."""
_APART = re.compile(rf"(?:.*\+)?apart:(?:[\w,.]+:)*({'|'.join(OF_THE_TARGET)})(?::.*)?")
EXACT_RULES = (
    "speculative_sampling",
    "match",
    "block",
    "k_seq",
    "optimal_transport",
    "spechub",
    "traversal",
)
LOSSY_RULES = ("tv_budget", "over_acceptance", "lenience", "mentored", "typical", "top_k", "neighbours", "cluster")
"""The rules of `verify.registry` that keep the target's distribution, and those that do not."""
DTYPES: Mapping[str, str] = {
    **{name: name for name in ("bfloat16", "float16", "float32", "float64")},
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
}
"""Number formats of weights: what --dtype takes -> PyTorch's name."""
IMPLEMENTATIONS = ("auto", "lean", "hf")
"""What runs a model: our runtime, transformers, or the first of them that can."""
_DEVICE = re.compile(r"auto|cpu(:0)?|cuda(:\d{1,3})?")
MOST = 64
"""The longest draft that may be asked for."""
LENGTHS: Mapping[str, str] = {
    "auto": "by load in a server, fixed elsewhere",
    "fixed": "the draft length, always",
    "adaptive": "one length for all, the fastest for the present load",
    "per_sequence": "its own for each sequence, from its own acceptance, under a budget for the present load",
    "bass": "BASS's rule: longer after a draft that was accepted whole, else shorter",
}
"""What sets draft lengths, by the name that `--lengths` gives it."""
_LONGEST = {"per_sequence": 12, "bass": 32}
"""The longest draft where no number stands behind the name; else it is the draft length."""
INPUT_BITS = (8, 16)
"""To how many bits products with weights in blocks may round their inputs."""
_TEXTS = ("draft", "rule", "dtype", "device", "implementation", "kv_dtype")


@no_type_check  # its own checks give the messages for users; a type checker in tests must not raise first
@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The options of an engine. Every field is checked on construction; a bad one raises ConfigError.

    target:         a folder or a Hub name; None: the shipped pair, or a target that was given as an object.
    draft:          what proposes draft tokens: a spec of `load_drafter`.
    length:         tokens proposed per step, >= 0; 0 is plain decoding. Where `lengths` follows measurements: the first, and that
                    of sampled requests with a seed of their own.
    lengths:        one of `LENGTHS`, and behind a colon the longest draft where it follows measurements: "per_sequence:12".
    rule:           the verification rule: "auto", or a name of `load_rule`.
    allow_lossy:    whether the rule may change the distribution of the text.
    dtype, device, implementation: see `load_target`.
    target_quantize, draft_quantize: None, or a type to round the weights of the target, and of a draft model or a trained drafter,
                    to, as "q8_0": see `models.quantised.QUANTIZE`. The declared distribution is then that of the rounded target.
    draft_vocabulary: None: all tokens; or how many of them a draft model keeps in its head, those that the target uses most; or
                    "auto": as many as promise the most tokens per second, all where no fewer do. See `models.vocabulary_choice`.
    max_length:     tokens of context to reserve for prompt and output, >= 1; None: the model's.
    slots:          sequences decoded together, >= 1.
    chunk:          most tokens of a prompt in one forward pass, >= 1.
    prefix_cache:   whether a sequence may use what others with the same beginning have computed. It never changes a text.
    kv_memory:      GB (10^9 bytes) for the keys and values of target and drafter, > 0; None: what all slots could fill, or 90% of
                    the memory that is free when the engine is built, if that is less.
    kv_dtype:       what the target's keys and values are stored as, see `nn.stored.KV_DTYPES`. The declared distribution is then
                    that of the target with such a cache.
    input_bits:     8, or 16: to how many bits products with weights in blocks round their inputs, of the target alone.
    """

    target: str | None = None
    draft: str = "auto"
    length: int = 3
    rule: str = "auto"
    allow_lossy: bool = False
    dtype: str = "auto"
    device: str = "auto"
    implementation: str = "auto"
    target_quantize: str | None = None
    draft_quantize: str | None = None
    max_length: int | None = None
    slots: int = 8
    chunk: int = 256
    prefix_cache: bool = True
    kv_memory: float | None = None
    kv_dtype: str = "auto"
    input_bits: int = 8
    lengths: str = "auto"
    draft_vocabulary: int | str | None = None

    def __post_init__(self) -> None:
        for name in _LEAST:  # numbers of numpy and PyTorch
            value = getattr(self, name)
            if not isinstance(value, int) and hasattr(value, "__index__"):
                with suppress(TypeError):  # of a tensor of several
                    object.__setattr__(self, name, operator.index(value))
        for name in ("dtype", "device"):  # PyTorch's own objects of these names
            if type(getattr(self, name)).__module__ == "torch":
                object.__setattr__(self, name, str(getattr(self, name)).removeprefix("torch."))
        for name in _TEXTS:
            value = getattr(self, name)
            if not isinstance(value, str):
                raise ConfigError(f"{name} must be a text, got {value!r}")
        for name, low in _LEAST.items():
            value = getattr(self, name)
            if value is None and name == "max_length":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name} must be a whole number of at least {low}, got {value!r}")
        if self.input_bits not in INPUT_BITS:
            raise ConfigError(f"input_bits must be {' or '.join(map(str, INPUT_BITS))}, got {self.input_bits!r}")
        memory = self.kv_memory
        if memory is not None and (
            isinstance(memory, bool)
            or not isinstance(memory, int | float | SupportsFloat)
            or not 0 < float(memory) < 1e9
        ):
            raise ConfigError(f"kv_memory must be a number of GB above 0, got {memory!r}")
        if memory is not None:
            object.__setattr__(self, "kv_memory", float(memory))
        if found := _APART.fullmatch(self.draft):  # said before a target is loaded
            raise not_apart(found[1])
        _check_named("dtype", self.dtype, ("auto", *DTYPES))
        check_device(self.device)
        _check_named("implementation", self.implementation, IMPLEMENTATIONS)
        _check_lengths(self.lengths, self.length)
        object.__setattr__(self, "draft_vocabulary", _vocabulary(self.draft_vocabulary))

    @property
    def follows(self) -> str:
        """What sets draft lengths, without its number."""
        return self.lengths.partition(":")[0]

    @property
    def longest(self) -> int:
        """The longest draft that a sequence may get; 0 where nothing is drafted."""
        name, _, number = self.lengths.partition(":")
        most = int(number) if number else max(_LONGEST.get(name, 0), self.length)
        return most if self.length else 0

    def changed(self, **changes: object) -> EngineOptions:
        """The same options except `changes`. Raises ConfigError for an unknown name, with the nearest known one."""
        check_names(changes)
        return replace(self, **changes)


def not_apart(kind: str) -> CapabilityError:
    """What there is to say of a drafter that is no draft model and is asked for in a process of its own."""
    return CapabilityError(f"only draft models run in a process of their own, not {kind!r}: drop 'apart:'")


class EngineKeywords(TypedDict, total=False):
    """The options of an engine as keyword arguments, for editors: `EngineOptions` says what they mean and what they are without."""

    length: int
    lengths: str
    allow_lossy: bool
    dtype: str
    device: str
    implementation: str
    target_quantize: str | None
    draft_quantize: str | None
    draft_vocabulary: int | str | None
    max_length: int | None
    slots: int
    chunk: int
    prefix_cache: bool
    kv_memory: float | None
    kv_dtype: str
    input_bits: int


_Function = TypeVar("_Function", bound=Callable[..., Any])


def with_keywords(function: _Function) -> _Function:
    """`function` with the engine's options in its signature, in the place of `**options`: notebooks complete them from there."""
    own = [p for p in signature(function).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    taken = {p.name for p in own}
    added = [
        Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(EngineOptions)
        if f.name in EngineKeywords.__annotations__ and f.name not in taken
    ]
    function.__signature__ = signature(function).replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    return function


def _check_named(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise ConfigError for a name that no table has: said before PyTorch is imported, which takes seconds."""
    if name not in known:
        raise ConfigError(unknown_name(kind, name, known))


def check_device(name: str) -> None:
    """Raise ConfigError for a device that models do not run on here; whether the machine has it, PyTorch says later."""
    if not _DEVICE.fullmatch(name):
        raise ConfigError(f"unknown device {name!r}; use 'auto', 'cpu' or 'cuda' (or one of several, as 'cuda:1')")


def _check_lengths(lengths: object, length: int) -> None:
    """Raise ConfigError for a bad `lengths` beside this draft length."""
    if not isinstance(lengths, str):
        raise ConfigError(f"lengths must be a text, got {lengths!r}")
    name, colon, number = lengths.partition(":")
    _check_named("way to set draft lengths", name, LENGTHS)
    if not colon:
        return
    if name in ("auto", "fixed"):
        raise ConfigError(f"lengths {name!r} takes no number: the draft length is the longest draft")
    if not re.fullmatch(r"\d{1,2}", number) or not max(length, 1) <= int(number) <= MOST:
        raise ConfigError(
            f"lengths {lengths!r}: behind the colon stands the longest draft, {max(length, 1)} (the draft length) to {MOST}"
        )


def _vocabulary(value: object) -> int | str | None:
    """A `draft_vocabulary` as a number, "auto" or None. Raises ConfigError for another one."""
    if isinstance(value, str) and len(value) <= 12 and re.fullmatch(r"[0-9]+(_[0-9]+)*", value):
        value = int(value)
    if value is None or value == "auto" or (type(value) is int and value >= 1):
        return value  # type: ignore[return-value]
    raise ConfigError(f"draft_vocabulary must be 'auto' or the number of tokens to keep, at least 1, got {value!r}")


def types_of(name: str) -> tuple[type, ...]:
    """The types of an option's value if it is set, that is without None."""
    hint = get_annotations(EngineOptions, eval_str=True)[name]
    return tuple(t for t in (get_args(hint) or (hint,)) if t is not type(None))


def check_names(names: Iterable[str]) -> None:
    """Raise ConfigError for the first of `names` that is not an engine option."""
    known = [f.name for f in fields(EngineOptions)]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigError(unknown_name("engine option", unknown[0], known))
