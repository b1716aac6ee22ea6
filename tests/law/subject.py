"""The rules and the noise as a test subject: loaded from their sources as they are, or with one planted mistake.

Loaded apart from the imported package, so a mistake cannot leak into another test, and without the runtime type checks that
the test run installs (they are six times as slow as the rules; the twins test runs the checked package).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import outrider.noise
import outrider.verify

PACKAGE = "outrider.verify"
NAMES = ("numerics", "chain", "tree", "match")


@dataclass(frozen=True)
class Patch:
    """A planted mistake: in `file` (of the package, without .py), `old` (which stands there once) becomes `new`."""

    file: str
    old: str
    new: str

    def apply(self, file: str, source: str) -> str:
        if file != self.file:
            return source
        if source.count(self.old) != 1:
            raise AssertionError(
                f"{file}.py holds {source.count(self.old)} times the text {self.old!r}: update the mutant"
            )
        return source.replace(self.old, self.new)


@dataclass(frozen=True)
class Subject:
    """What the law checks run on."""

    rule: Callable
    match: Callable
    chains: Callable
    forest: Callable
    draw: Callable
    as_weights: Callable
    match_probability: Callable
    noise: type


def load(patch: Patch | None = None) -> Subject:
    """The honest subject, or one with a mistake."""
    folder = Path(outrider.verify.__file__).parent
    saved = {name: module for name, module in sys.modules.items() if name.split(".")[:2] == PACKAGE.split(".")}
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    try:
        for name in saved:
            del sys.modules[name]
        sys.modules[PACKAGE] = package
        sys.modules[f"{PACKAGE}.native"] = saved[
            f"{PACKAGE}.native"
        ]  # one library, whichever copy of the rules calls it
        package.native = saved[f"{PACKAGE}.native"]
        parts = {}
        for name in NAMES:
            parts[name] = _execute(f"{PACKAGE}.{name}", folder / f"{name}.py", patch)
            setattr(package, name, parts[name])
        noise = _execute("tests.law._noise_copy", Path(outrider.noise.__file__), patch)
    finally:
        for name in [name for name in sys.modules if name.split(".")[:2] == PACKAGE.split(".")]:
            del sys.modules[name]
        sys.modules.update(saved)
    common = parts["numerics"]
    return Subject(
        rule=parts["tree"].SpeculativeSampling(),
        match=parts["match"].Match(),
        chains=parts["chain"].judge_chains,
        forest=parts["tree"].judge_forest,
        draw=common.draw,
        as_weights=common.as_weights,
        match_probability=parts["match"].match_probability,
        noise=noise.Noise,
    )


def _execute(name: str, path: Path, patch: Patch | None) -> ModuleType:
    source = path.read_text()
    if patch is not None:
        source = patch.apply(path.stem, source)
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module
