"""Presets of `outrider bench`: lists of arms, as data. A preset says what is compared; how it is measured never differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from outrider.build import Engine, companion
from outrider.drafters.registry import companion_folder
from outrider.errors import CapabilityError, ConfigError, unknown_name
from outrider.evaluate.measure import Arm

Cost = Literal["nothing", "model", "layer", "heads", "sequence", "block"]
"""What drafting one step costs, for predictions at other sizes: see `scale.drafting_seconds`."""
DRAFT = "DRAFT"
"""Stands for the draft model in a spec: the target's companion, or the one that is named."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One arm. draft: a spec of `load_drafter`, None for the engine's own. length: tokens, or levels, per step."""

    name: str
    draft: str | None
    length: int
    cost: Cost = "model"


PRESETS: dict[str, tuple[Spec, ...]] = {
    "chart": (
        Spec("plain", "none", 0, "nothing"),
        Spec("draft model, 3", DRAFT, 3),
        Spec("draft model, 5", DRAFT, 5),
        Spec("Medusa", "medusa", 4, "sequence"),
        Spec("EAGLE, chain", "eagle", 5, "layer"),
        Spec("EAGLE, dynamic tree", "dynamic:16:eagle", 4, "layer"),
        Spec("block diffusion", "dflash", 3, "block"),
        Spec("n-gram", "ngram", 5, "nothing"),
        Spec("suffix", "suffix", 8, "nothing"),
    ),
    "eagle": (
        Spec("plain", "none", 0, "nothing"),
        Spec("draft model, 3", DRAFT, 3),
        Spec("draft model, 5", DRAFT, 5),
        Spec("EAGLE, chain of 3", "eagle", 3, "layer"),
        Spec("EAGLE, chain", "eagle", 5, "layer"),
    ),
    "untrained": (
        Spec("plain", "none", 0, "nothing"),
        Spec("n-gram", "ngram", 8, "nothing"),
        Spec("suffix, 8", "suffix", 8, "nothing"),
        Spec("suffix, 16", "suffix", 16, "nothing"),
        Spec("recycled", "recycle", 4, "nothing"),
        Spec("recycled, tree", "recycle:3x2x1", 3, "nothing"),
        Spec("draft model, 3", DRAFT, 3),
        Spec("suffix or model", f"suffix+{DRAFT}", 6),
    ),
    "stopping": (
        Spec("plain", "none", 0, "nothing"),
        Spec("draft model, 3", DRAFT, 3),
        Spec("draft model, 5", DRAFT, 5),
        Spec("draft model, 8", DRAFT, 8),
        Spec("draft model, stops", f"stop:{DRAFT}", 10),
        Spec("EAGLE, chain", "eagle", 4, "layer"),
        Spec("EAGLE, stops", "stop:eagle", 8, "layer"),
    ),
}
"""The first arm is the base of every ratio."""


def preset(name: str) -> tuple[Spec, ...]:
    """The arms of a preset; ConfigError names the nearest known one."""
    if name not in PRESETS:
        raise ConfigError(unknown_name("preset", name, PRESETS))
    return PRESETS[name]


def by_length(lengths: Sequence[int]) -> tuple[Spec, ...]:
    """Arms that differ in the draft length alone; 0 is plain decoding."""
    return tuple(
        Spec("plain" if n == 0 else f"length {n}", "none" if n == 0 else None, n, "nothing" if n == 0 else "model")
        for n in lengths
    )


def rivals(specs: Sequence[Spec], asked: Sequence[str] | None = None) -> tuple[str, ...]:
    """The arms that all others are compared with besides the base: those that were asked for, else the draft model's.

    Raises ConfigError for a name that no arm has.
    """
    if not asked:
        return tuple(s.name for s in specs if s.draft == DRAFT)
    known = [s.name for s in specs]
    for name in asked:
        if name not in known:
            raise ConfigError(unknown_name("arm", name, known))
    return tuple(dict.fromkeys(asked))


def present(asked: Sequence[str], absent: Mapping[str, str]) -> None:
    """ConfigError where an arm that others are to be compared with cannot be had."""
    for name in asked:
        if name in absent:
            raise ConfigError(f"nothing can be compared with {name!r}: {absent[name]}")


def arms_of(engine: Engine, specs: Sequence[Spec], draft: str = "auto") -> tuple[list[Arm], dict[str, str]]:
    """Engines of all arms that can be had on the engine's target, and for each other one the sentence that says why not.

    draft: the draft model; "auto": the companion of the target's folder. Raises what the first arm, the base, raises.
    """
    arms, absent = [], {}
    for spec in specs:
        try:
            made = companion(engine, _draft(engine, spec, draft), length=spec.length)
            if spec.length and not made.parts.drafter.max_nodes:
                absent[spec.name] = f"the drafter {made.parts.drafter.name!r} proposes nothing: it is plain decoding"
                continue
            arms.append(Arm(spec.name, made))
        except (ConfigError, CapabilityError) as error:
            if spec is specs[0]:
                raise
            absent[spec.name] = str(error)
    return arms, absent


def _draft(engine: Engine, spec: Spec, draft: str) -> str | None:
    if spec.draft is None or DRAFT not in spec.draft:
        return spec.draft
    if draft == "auto":
        path = engine.loaded.path if engine.loaded else None
        found = companion_folder(path, "draft")
        if found is None:
            raise ConfigError("this target has no companion folder 'draft': name a draft model with --draft")
        draft = found
    return spec.draft.replace(DRAFT, draft)
