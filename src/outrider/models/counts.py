"""Bounds on what a configuration makes transformers build: without weights too each layer, expert and head that is a module of its
own takes time and memory, and a configuration comes from outside."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any

from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from outrider.errors import ConfigError
from outrider.models.config import MOST_LAYERS

MOST_PARTS = 4096
"""Most experts, heads or groups: eight times those of the largest published models."""
MOST_MODULES = 40_000
"""Most modules and weights of a skeleton, which take a second: more than 1,024 layers of any family have."""
_LAYERS = frozenset(
    """layer layers block blocks depth depths stage stages stacks cycles loops repeats flows times replace types branches convs
    codebooks quantizers inputs""".split()  # noqa: SIM905
)
"""The last words of the names of numbers, and lists, by which configurations of transformers count layers and their kin."""
_PARTS = frozenset("expert experts head heads group groups".split())  # noqa: SIM905
_NAMED = frozenset({"vocabulary_map", "label2id"})
"""Numbers by words of a vocabulary, or by what a user calls things: "heads" is no count there."""


def check_counts(folder: Path, raw: Any, key: str = "") -> None:
    """Raise ConfigError if a count of config.json, in any of its parts, is more than any model has."""
    if isinstance(raw, dict):
        for name, value in raw.items():
            if name not in _NAMED:
                check_counts(folder, value, str(name))
    elif isinstance(raw, list):
        for value in raw:
            check_counts(folder, value, key)
    elif isinstance(raw, int) and raw > (most := _most(key)):
        raise ConfigError(
            f"{folder / 'config.json'}: {key[:80]} {str(raw)[:20]} is more than {most}: check its configuration"
        )


def _most(key: str) -> float:
    last = re.split(r"[_\W]", key.lower())[-1]
    return MOST_LAYERS if last in _LAYERS else MOST_PARTS if last in _PARTS else float("inf")


class TooMany(Exception):
    """Ends the building of a model of too many modules; never reaches the user."""


@contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """Context in which no more than MOST_MODULES modules and weights are put together. Raises ConfigError for more.

    Whatever name a family has for the number that it loops over, each round of such a loop makes modules or weights. What other
    threads build meanwhile is theirs.
    """
    count, mine = 0, get_ident()

    def one(*_: object) -> None:
        nonlocal count
        if get_ident() != mine:
            return
        count += 1
        if count > MOST_MODULES:
            raise TooMany

    hooks = register_module_module_registration_hook(one), register_module_parameter_registration_hook(one)
    try:
        yield
    except TooMany:
        raise ConfigError(
            f"{folder / 'config.json'} describes a model of more than {MOST_MODULES} modules: check its layers and experts"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
