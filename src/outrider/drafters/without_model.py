"""The drafters without a model, by the names that `--draft` gives them, alone or before another: "suffix", "ngram:2-4+PATH"."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from outrider.drafters.forced import Forced
from outrider.drafters.ngram import NGram
from outrider.drafters.prediction import PredictedOutput
from outrider.drafters.recycle import Recycle
from outrider.drafters.suffix import MEMORY, Suffix
from outrider.drafters.tree.shapes import levels
from outrider.errors import ConfigError
from outrider.options import PART
from outrider.protocols import Drafter


def hosts_of(spec: str, length: int) -> tuple[list[Drafter], str]:
    """The drafters without a model at the start of `spec`, and the rest of it, "" if there is none."""
    parts: list[Drafter] = []
    while (head := PART.match(spec)) is not None:
        parts.append(_host(head.group(1), length))
        spec = spec[head.end() :]
        if not spec and head.group(2):
            raise ConfigError(f"a drafter is missing after {head.group(0)!r}: name one, or drop the '+'")
    return parts, spec


def _host(spec: str, length: int) -> Drafter:
    """One of HOSTS, with what stands behind its name."""
    kind, colon, option = spec.partition(":")
    return HOSTS[kind](length, option if colon else None)


def _ngram(length: int, sizes: str | None) -> NGram:
    if sizes is None:
        return NGram(length)
    found = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", sizes)
    if found is None:
        raise ConfigError(f"n-gram sizes are written 'ngram:MIN-MAX' or 'ngram:N', got 'ngram:{sizes}'")
    return NGram(length, min_n=int(found.group(1)), max_n=int(found.group(2) or found.group(1)))


def _recycle(length: int, widths: str | None) -> Recycle:
    if widths is None:
        return Recycle(levels((1,) * length))
    if re.fullmatch(r"\d{1,4}(x\d{1,4})*", widths) is None:
        raise ConfigError(
            f"a recycled tree is written 'recycle:3x2x1' (children of a node of each level), got {widths!r}"
        )
    shape = levels(tuple(map(int, widths.split("x"))))
    if shape.depth > length:
        raise ConfigError(
            f"the tree 'recycle:{widths}' has {shape.depth} levels, the draft length is {length}: raise it"
        )
    return Recycle(shape)


HOSTS: Mapping[str, Callable[[int, str | None], Drafter]] = {
    "ngram": _ngram,
    "prediction": lambda length, _: PredictedOutput(length),
    "forced": lambda length, least: Forced(length, int(least or 1)),
    "suffix": lambda length, memory: Suffix(length, shared=MEMORY if memory else 0),
    "recycle": _recycle,
}
"""The drafters of `options.WITHOUT_MODEL`: (draft length, what stands behind the name and a colon, or None) -> the drafter."""


def check_option(kind: str, option: str, spec: str, named: str) -> None:
    """Raise ConfigError for a drafter without a model that has an option which it does not know, or a prefix."""
    if kind not in HOSTS or Path(named).exists():
        return
    if spec == named:
        raise ConfigError(f"{kind!r} has no option {option!r}: write {kind!r}, or see --draft in docs/drafters.md")
    raise ConfigError(f"{kind!r} has no distributions to draw from and takes no prefix: write {named!r}, got {spec!r}")
