"""Training data in shards: ranges of rows that several processes or machines write, and one folder that they become.

A shard has a folder of its own on storage that all share. A worker writes into a temporary folder and renames it when it is whole,
so a shard is there entirely or not at all, and once, however many tried. The merged folder equals the one that a single process
with as many threads writes, byte for byte: a row depends on its number alone, and shards begin where groups of rows do.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from outrider.errors import ConfigError
from outrider.files import sha256_of, sync, write_whole
from outrider.models.folder import identity_of, resolve_folder
from outrider.train.features import group_of, write_hidden, write_tokens
from outrider.train.job import Job
from outrider.train.keyed import hidden_folder
from outrider.train.pipeline import Part, engine_of, layers_of, parts_of

MANIFEST = "manifest.json"
ARRAYS = ("tokens", "hidden")
Report = Callable[[str], None]


def span_of(rows: int, group: int, index: int, count: int) -> range:
    """The rows of shard `index` of `count`: whole groups, contiguous, as even as groups allow. Empty where there are too few."""
    groups = -(-rows // group)
    first, last = (min(rows, group * (groups * i // count)) for i in (index, index + 1))
    return range(first, last)


def place_of(part: Part, index: int, count: int) -> Path:
    """The folder of a shard."""
    return part.folder.with_name(f"{part.folder.name}.shards-{count}") / f"shard-{index}"


def write_shard(job: Job, index: int, count: int, report: Report = print) -> dict[str, Any]:
    """Write shard `index` of `count` of both parts; the manifests by part. A shard that is there is only read.

    Raises ConfigError for a shard that was made for something else.
    """
    if not 0 <= index < count:
        raise ConfigError(f"there is no shard {index} of {count}: they are numbered from 0")
    engine = engine_of(job)
    target = engine.parts.target
    layers, out = layers_of(job, target), dict[str, Any]()
    for part in parts_of(job, engine, report):
        span, place = span_of(part.wanted.rows, group_of(job.slots), index, count), place_of(part, index, count)
        about = about_of(job, part, span, layers)
        if not (place / MANIFEST).exists():
            built = place.with_name(f".tmp-{place.name}-{secrets.token_hex(6)}")
            tokens = write_tokens(engine, part.documents, part.wanted, built, report, part.apart, span)
            write_hidden(target, tokens, layers, built, report=report)
            sums = {name: sha256_of(built / f"{name}.npy") for name in ARRAYS}
            write_whole(built / MANIFEST, (json.dumps({**about, "sha256": sums}, indent=1) + "\n").encode())
            put(built, place)
        out[part.name] = manifest_of(place, about)
    return out


def about_of(job: Job, part: Part, span: range, layers: tuple[int, ...]) -> dict[str, Any]:
    """What a manifest says besides the sums of its files. seeds: of the first row and behind the last."""
    first = part.wanted.seed * 1_000_003
    return {
        "part": part.folder.name,
        "rows": [span.start, span.stop],
        "of": part.wanted.rows,
        "seeds": [first + span.start, first + span.stop],
        "target": identity_of(resolve_folder(job.target)),
        "layers": list(layers),
    }


def put(built: Path, place: Path) -> None:
    """Give a finished shard its name; where another attempt was faster, its shard stays and this one goes."""
    for name in built.iterdir():
        sync(name)
    try:
        os.rename(built, place)
    except OSError:
        shutil.rmtree(built)
        if not (place / MANIFEST).exists():
            raise


def manifest_of(place: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a shard. Raises ConfigError where there is none, or one of something else."""
    try:
        found = json.loads((place / MANIFEST).read_text())
    except (OSError, ValueError):
        raise ConfigError(f"{place}: there is no such shard, or it is not whole: write it again") from None
    if {k: v for k, v in found.items() if k != "sha256"} != json.loads(json.dumps(about)):
        raise ConfigError(
            f"{place} was made for {found.get('part')}, rows {found.get('rows')}: remove it, and write it again"
        )
    return found


def merge(job: Job, count: int, report: Report = print) -> list[Path]:
    """Make the data folders of `outrider train` of all shards, and remove those; a folder that is whole already is left as it is.

    Raises ConfigError for a shard that is missing, or whose bytes are not those that its manifest names.
    """
    engine = engine_of(job)
    layers = layers_of(job, engine.parts.target)
    out = []
    for part in parts_of(job, engine, report):
        hidden, held = hidden_folder(part.folder, layers)
        if not (whole(part.folder, "tokens", part) and whole(hidden, "hidden", part)):
            spans = [span_of(part.wanted.rows, group_of(job.slots), i, count) for i in range(count)]
            places = [place_of(part, i, count) for i in range(count)]
            for place, span in zip(places, spans, strict=True):
                checked(place, about_of(job, part, span, layers))
            if held != layers:
                raise ConfigError(
                    f"{hidden} holds layers {list(held)}, and the shards {list(layers)}: remove one of them"
                )
            hidden.mkdir(exist_ok=True)
            shutil.copyfile(places[0] / "wanted.json", part.folder / "wanted.json")
            shutil.copyfile(places[0] / "hidden.json", hidden / "hidden.json")
            joined(places, "tokens", part.folder)
            joined(places, "hidden", hidden)
            report(f"{part.folder}: {part.wanted.rows} rows of {count} shards")
        shutil.rmtree(place_of(part, 0, count).parent, ignore_errors=True)
        out.append(part.folder)
    return out


def whole(folder: Path, name: str, part: Part) -> bool:
    """Whether all rows of an array are there."""
    done = folder / f"{name}.done"
    return done.exists() and int(done.read_text()) == part.wanted.rows


def checked(place: Path, about: dict[str, Any]) -> None:
    """Compare a shard's files with its manifest."""
    for name, digest in manifest_of(place, about)["sha256"].items():
        if sha256_of(place / f"{name}.npy") != digest:
            raise ConfigError(f"{place / name}.npy is damaged: remove {place}, and write it again")


def joined(places: list[Path], name: str, folder: Path) -> None:
    """One array of the shards' rows in order; its rows count as done when all are on the disk."""
    parts = [np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for place in places]
    rows = sum(len(p) for p in parts)
    built = folder / f".tmp-{name}.npy"
    total = np.lib.format.open_memmap(built, mode="w+", dtype=parts[0].dtype, shape=(rows, *parts[0].shape[1:]))
    at = 0
    for part in parts:
        total[at : at + len(part)] = part
        at += len(part)
    total.flush()
    os.replace(built, folder / f"{name}.npy")
    write_whole(folder / f"{name}.done", str(rows).encode())
