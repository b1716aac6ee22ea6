"""The kind `features` of `outrider sweep`: a shard of the data that `outrider train` begins with."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from outrider.assets import shipped
from outrider.cli.train_options import TrainOptions
from outrider.evaluate.sweep.cells import Answer, Kind
from outrider.evaluate.sweep.fields import Fields, Seed, Text
from outrider.models.folder import resolve_folder

Rows = Annotated[int, Field(ge=1, le=100_000_000)]


class Features(Fields):
    """Shard `shard` of `shards` of the text and hidden states for `outrider train` with the same options and work folder."""

    kind: Literal["features"]
    train: Text
    shards: Annotated[int, Field(ge=1, le=10_000)]
    shard: Annotated[int, Field(ge=0, lt=10_000)]
    work: Text = "runs/drafters"
    target: Text | None = None
    data: Annotated[list[Text], Field(min_length=1, max_length=1000)] | None = None
    pattern: Text | None = None
    skip_bad: bool = False
    rows: Rows = 800
    held_out: Rows = 64
    prompt: Rows = 64
    length: Annotated[int, Field(ge=8, le=1_000_000)] = 256
    as_written: bool = False
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    taps: Text | None = None
    seed: Seed = 0

    @model_validator(mode="after")
    def is_one_of_them(self) -> Features:
        """A shard that there is."""
        if self.shard >= self.shards:
            raise ValueError(f"there is no shard {self.shard} of {self.shards}: they are numbered from 0")
        return self


def job_of(f: Features) -> Any:
    """As `outrider train` makes it of the same options."""
    apart = {"kind", "threads", "train", "shards", "shard", "target", "data", "work"}
    same = {k: v for k, v in f.model_dump().items() if k not in apart}
    data = None if f.data is None else [Path(p) for p in f.data]
    return TrainOptions(data=data, work=Path(f.work), **same).job(f.train, f.target)


def reads(f: Features) -> list[Path]:
    """The target, and every file of text."""
    target = shipped("target") if f.target is None else resolve_folder(f.target)
    places = [Path(p) for p in f.data] if f.data else [Path(sysconfig.get_paths()["stdlib"])]
    pattern = f.pattern or ("*" if f.data else "*.py")
    files = [p for place in places for p in (sorted(place.rglob(pattern)) if place.is_dir() else [place])]
    return [target, *(p for p in files if not p.is_dir() and "__pycache__" not in p.parts)]


def perform(f: Features) -> Answer:
    """Write the shard, or find it there."""
    from outrider.train.shards import write_shard

    return Answer({"parts": write_shard(job_of(f), f.shard, f.shards, lambda _: None)}, {})


def headline(record: Mapping[str, Any]) -> str:
    """Its rows."""
    parts = record["result"]["parts"]
    return ", ".join(f"{name} rows {m['rows'][0]} to {m['rows'][1]}" for name, m in sorted(parts.items()))


def finish(done: list[Features]) -> list[str]:
    """Merge every set of shards that is complete."""
    from outrider.train.shards import merge

    groups: dict[str, list[Features]] = {}
    for f in done:
        groups.setdefault(f.model_copy(update={"shard": 0}).model_dump_json(), []).append(f)
    out = []
    for group in groups.values():
        if len(group) == group[0].shards:
            places = merge(job_of(group[0]), group[0].shards, lambda _: None)
            out.append(f"{group[0].shards} shards are merged: {', '.join(map(str, places))}")
    return out


KIND = Kind("features", Features, lambda f: False, reads, perform, headline, finish)
