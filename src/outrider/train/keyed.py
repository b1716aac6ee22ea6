"""Folders of training data in a work folder, named by a key of everything that the data depend on.

Two trainings that differ in target, text or settings get two folders, and two that agree share one. Text that the target wrote is
the expensive part, so drafters that read other layers share it and have separate hidden states beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from outrider.files import write_whole
from outrider.train.data import Document
from outrider.train.features import DataSpec

ABOUT = "about.json"


def key_of(known: Any) -> str:
    """A short name for plain data: different data, different name."""
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def part_folder(
    work: Path,
    part: str,
    target: str,
    documents: Sequence[Document],
    wanted: DataSpec,
    prompts: Sequence[Sequence[int]],
) -> Path:
    """The folder of a part ("training" or "held_out") of the data, described in its about.json; it is created.

    target: identity of the model that writes (`models.folder.identity_of`). documents: the part's source texts, in order.
    prompts: tokens that its rows begin with, cut from the documents.
    """
    text = hashlib.sha256("".join(d.digest for d in documents).encode()).hexdigest()
    known = {"target": target, "text": text, "prompts": key_of([list(p) for p in prompts]), **asdict(wanted)}
    folder = work / "data" / f"{part}-{key_of(known)}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ABOUT).exists():
        write_whole(folder / ABOUT, (json.dumps(known, indent=1) + "\n").encode())
    return folder


def hidden_folder(part: Path, layers: tuple[int, ...]) -> tuple[Path, tuple[int, ...]]:
    """The folder of the hidden states of these layers, existing or new, and its layers, which may be more than these."""
    for note in sorted(part.glob("layers-*/hidden.json")):
        held = tuple(json.loads(note.read_text())["layers"])
        if set(layers) <= set(held):
            return note.parent, held
    return part / ("layers-" + "-".join(map(str, layers))), layers


def run_folder(work: Path, kind: str, parts: Sequence[Path], choices: dict[str, Any]) -> Path:
    """The folder for training a drafter of this kind on these parts with these choices, described in about.json; it is created."""
    known = {"parts": [p.name for p in parts], **choices}
    folder = work / kind / key_of(known)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ABOUT).exists():
        write_whole(folder / ABOUT, (json.dumps(known, indent=1) + "\n").encode())
    return folder


def other_products(folder: Path) -> Path | None:
    """The newest checkpoint of a training beside this one that differs from it in `autocast` alone.

    folder: as `run_folder` gives it.
    """
    mine = json.loads((folder / ABOUT).read_text())
    loop = mine["loop"]
    twin = mine | {"loop": loop | {"autocast": not loop["autocast"]}}
    found = [note.parent for note in folder.parent.glob(f"*/{ABOUT}") if json.loads(note.read_text()) == twin]
    return next((path for place in found for path in sorted(place.glob("step-*"))[-1:]), None)


def shorter_run(folder: Path) -> Path | None:
    """The newest checkpoint of a training beside this one that differs from it in a smaller number of steps (and the warm-up)
    alone.

    folder: as `run_folder` gives it.
    """
    mine, found = json.loads((folder / ABOUT).read_text()), list[tuple[int, Path]]()
    for note in folder.parent.glob(f"*/{ABOUT}"):
        other = json.loads(note.read_text())
        loop, own = other.get("loop"), mine["loop"]
        if (
            not isinstance(loop, dict)
            or not loop.get("steps", own["steps"]) < own["steps"]
            or loop["warmup"] > own["warmup"]
        ):
            continue
        if other | {"loop": loop | {"steps": own["steps"], "warmup": own["warmup"]}} == mine:
            found += [(loop["steps"], path) for path in sorted(note.parent.glob("step-*"))[-1:]]
    return max(found, default=(0, None))[1]
