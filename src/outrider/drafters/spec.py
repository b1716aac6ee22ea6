"""The grammar of `--draft`: the prefix before a path says how drafts grow."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from outrider.drafters.tree.gain import LEAST, ByGain, Dynamic
from outrider.drafters.tree.growth import Growth, Levels, Sample, Siblings
from outrider.drafters.tree.shapes import MergedDrafts, Shape, Static, levels
from outrider.errors import ConfigError
from outrider.nn.held import Rounding

SHAPES = {
    "tree": "children of a node of each level, drawn without replacement",
    "iid": "children of a node of each level, drawn independently",
    "hub": "children of a node of each level, 2 or 1; pairs of the most likely token and another one",
    "batch": "independent drafts that share only the anchor",
    "shared": "independent drafts, merged where they agree",
}
"""Prefixes for trees of a draft model, and the meaning of their numbers."""
WAYS: dict[str, Siblings] = {"tree": "without_replacement", "iid": "iid", "hub": "hub"}
"""How siblings of a tree written level by level are drawn."""


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """The prefix before a path: how the drafter grows its drafts.

    path: the rest, which names the drafter. sample, siblings, shape: see `growth.Levels`. dynamic: nodes of a tree that is rebuilt
    in every step, and the number of children considered per node; its depth is the shape's. stop: tokens that a further level of a
    chain must be expected to bring, see `gain.ByGain`. rounding: of a trained drafter's matrices, None to leave them as they are.
    Raises ConfigError for a prefix that should have stood before this one.
    """

    path: str
    sample: Sample
    siblings: Siblings
    shape: Shape
    dynamic: tuple[int, int] | None = None
    stop: float | None = None
    rounding: Rounding | None = None

    def __post_init__(self) -> None:
        if self.path.startswith(("apart:", "ahead:")) and not Path(self.path).exists():
            raise ConfigError(
                f"'apart:' and 'ahead:' stand first, in this order, as in 'apart:ahead:4:greedy:PATH': move {self.path!r} there"
            )

    def growth(self, vocab_size: int) -> Growth:
        """How drafts over `vocab_size` tokens grow."""
        if self.dynamic is not None:
            nodes, width = self.dynamic
            return Dynamic(nodes, self.shape.depth, vocab_size, width=width, sample=self.sample)
        if self.stop is not None:
            depth = self.shape.depth
            return ByGain(depth, depth, vocab_size, least=self.stop, sample=self.sample)
        return Levels(self.shape, vocab_size, sample=self.sample, siblings=self.siblings)

    def rounding_for(self, weight: Tensor, *, fits: bool = True) -> Rounding | None:
        """How the matrices of a drafter with this weight are rounded; None where they are not, or nothing multiplies blocks.

        fits: whether the compiled decoder runs heads of its shape."""
        return None if self.rounding is None or not fits else self.rounding.here(weight)

    def at_most(self, depth: int) -> DraftSpec:
        """The same spec for a drafter with at most `depth` levels: a longer chain is cut."""
        if self.shape.depth > depth and isinstance(self.shape, Static) and self.shape.width == 1:
            return replace(self, shape=levels((1,) * depth))
        return self


def parse_draft(spec: str, length: int, sample: Sample) -> DraftSpec:
    """Parse a spec after the drafters without a model: how to grow, and the drafter's path. Raises ConfigError for bad grammar."""
    if spec.startswith("stop:"):
        return _stopping(spec, length, sample)
    if spec.startswith("greedy:"):
        return DraftSpec(spec.removeprefix("greedy:"), "greedy", "iid", levels((1,) * length))
    if spec.startswith("dynamic:"):
        found = re.fullmatch(r"dynamic:(\d{1,4})(?:x(\d{1,3}))?:(.*)", spec)
        if found is None:
            raise ConfigError(
                f"a dynamic tree is written 'dynamic:NODES:PATH' or 'dynamic:NODESxWIDTH:PATH', got {spec!r}"
            )
        sizes = int(found.group(1)), int(found.group(2) or 4)
        return DraftSpec(found.group(3), sample, "iid", levels((1,) * length), sizes)
    if spec.partition(":")[0] in SHAPES:
        path, shape, siblings = _shape(spec, length)
        return DraftSpec(path, sample, siblings, shape)
    return DraftSpec(spec, sample, "iid", levels((1,) * length))


def parse_ahead(spec: str) -> tuple[int, str]:
    """How many outcomes drafts are prepared for, 0 for none, and the drafter: "ahead:4:PATH" is (4, "PATH")."""
    if not spec.startswith("ahead:"):
        return 0, spec
    found = re.fullmatch(r"ahead:(\d{1,2}):(.+)", spec)
    if found is None or int(found.group(1)) < 1:
        raise ConfigError(f"drafting ahead is written 'ahead:PREMISES:PATH', as 'ahead:4:PATH', got {spec!r}")
    return int(found.group(1)), found.group(2)


def _stopping(spec: str, length: int, sample: Sample) -> DraftSpec:
    """A chain that stops early: 'stop:PATH' or 'stop:0.3:PATH', where PATH may begin with 'greedy:'."""
    found = re.fullmatch(r"stop(?::(\d?\.?\d{1,4}))?:(.*)", spec)
    least = float(found.group(1) or LEAST) if found else 1.0
    if found is None or not 0.0 < least < 1.0:
        raise ConfigError(
            "a chain that stops early is written 'stop:PATH', or 'stop:0.3:PATH' with the tokens, 0 to 1, that a further one "
            f"must be expected to bring, got {spec!r}"
        )
    inner = parse_draft(found.group(2), length, sample)
    if inner.dynamic is not None or inner.stop is not None or found.group(2).partition(":")[0] in SHAPES:
        raise ConfigError(
            f"only chains stop early, and {found.group(2)!r} is none: drop 'stop:', or the prefix behind it"
        )
    return replace(inner, stop=least)


def _shape(spec: str, length: int) -> tuple[str, Shape, Siblings]:
    """Path, shape and way of drawing siblings of 'tree:3x2x1:PATH', 'batch:4:PATH' and the other SHAPES."""
    kind = spec.partition(":")[0]
    if found := re.fullmatch(r"(tree|iid|hub):((?:a|\d{1,4})(?:,(?:a|\d{1,4}))+|a):(.*)", spec):
        shape = Static(tuple(-1 if up == "a" else int(up) for up in found.group(2).split(",")))
        return found.group(3), _no_deeper(shape, length, spec), WAYS[kind]
    pattern, example = (r"(\d{1,4}(?:x\d{1,4})*)", "3x2x1") if kind in WAYS else (r"(\d{1,4})", "4")
    found = re.fullmatch(rf"{kind}:{pattern}:(.*)", spec)
    if found is None:
        raise ConfigError(f"a tree is written '{kind}:{example}:PATH' ({SHAPES[kind]}), got {spec!r}")
    numbers, path = tuple(int(w) for w in found.group(1).split("x")), found.group(2)
    if kind == "batch":
        return path, levels((numbers[0],) + (1,) * (length - 1)), "iid"
    if kind == "shared":
        return path, MergedDrafts(numbers[0], length), "iid"
    return path, _no_deeper(levels(numbers), length, spec), WAYS[kind]


def _no_deeper(shape: Static, length: int, spec: str) -> Static:
    if shape.depth > length:
        raise ConfigError(
            f"the tree of {spec!r} has {shape.depth} levels, the draft length is {length}: raise the length"
        )
    return shape
