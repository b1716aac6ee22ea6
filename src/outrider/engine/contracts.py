"""Whether a part has the shape of its protocol: its attributes are there and its methods take what the engine passes.

Parts are recognised by their interface. A part that does not fit is refused when an engine is built, with the expected signature,
instead of failing in the middle of a text with a TypeError.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from outrider.deprecated import adopt
from outrider.errors import CapabilityError

Methods = Mapping[str, tuple[str, ...]]

TARGET: Methods = {"new_kv": ("slots", "length"), "forward": ("rows", "kv", "layers=")}
RULE: Methods = {"__call__": ("p", "draft", "noise", "allowance")}
DRAFTER: Methods = {"bind": ("slots", "length"), "draft": ("evidence", "budget"), "release": ("slots",)}
CONTROLLER: Methods = {"budget": ("sequences",), "observe": ("record",)}
"""What the engine calls, with the arguments it passes; one that ends in "=" is passed by its name."""
ATTRIBUTES = {
    "target": ("vocab_size", "max_length", "trees", "rewinds", "device"),
    "rule": ("name", "lossless", "trees", "lane", "tv_limit"),
    "drafter": ("name", "layers", "max_nodes", "max_depth", "trees"),
    "controller": (),
}
HINTS = {
    "target": "a model of transformers becomes a target by outrider.models.hf.target.HFTarget(model)",
    "rule": "see outrider.protocols.Rule; a subclass of outrider.verify.SpeculativeSampling has them",
    "drafter": "see outrider.protocols.Drafter and examples/03_own_drafter.py",
    "controller": "see outrider.protocols.Controller",
}


def check_parts(target: object, drafter: object, rule: object, controller: object) -> None:
    """Raise CapabilityError for the first part without the interface the engine needs: which, what it lacks, what to do."""
    adopt(rule, "limit", "tv_limit")
    check("target", target, TARGET)
    check("drafter", drafter, DRAFTER)
    check("rule", rule, RULE)
    check("controller", controller, CONTROLLER)


def check(role: str, part: object, methods: Methods) -> None:
    """Raise CapabilityError unless `part` has the attributes of its role and methods that take the engine's arguments."""
    kind = part.__name__ if isinstance(part, type) else type(part).__name__
    if isinstance(part, type):
        raise CapabilityError(f"{kind} is a class and cannot be a {role}: pass an object of it, as in {kind}()")
    for name in ATTRIBUTES[role]:
        if not hasattr(part, name):
            raise CapabilityError(f"{kind} cannot be a {role}: it has no attribute {name!r}; {HINTS[role]}")
    for name, arguments in methods.items():
        wanted = f"{'' if name == '__call__' else name}({', '.join(a.rstrip('=') for a in arguments)})"
        method = getattr(part, name, None)
        if not callable(method):
            raise CapabilityError(f"{kind} cannot be a {role}: it has no {wanted}; {HINTS[role]}")
        if not takes(method, arguments):
            raise CapabilityError(
                f"{kind} cannot be a {role}: the engine calls it with {wanted}, and it takes "
                f"{inspect.signature(method)}; {HINTS[role]}"
            )


def takes(method: Any, arguments: tuple[str, ...]) -> bool:
    """Whether a method can be called with these arguments; True if its signature is unknown."""
    named = {a.rstrip("="): None for a in arguments if a.endswith("=")}
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*(None for a in arguments if not a.endswith("=")), **named)
    except TypeError:
        return False
    return True
