"""Training data in shards: together they are the folder of one process, byte for byte, whatever died on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from outrider.cli.train_options import TrainOptions
from outrider.errors import ConfigError
from outrider.train import pipeline, shards
from outrider.train.job import Job
from outrider.train.pipeline import engine_of, prepare
from outrider.train.shards import merge, span_of, write_shard


def silent(_: str) -> None:
    """Nobody is told."""


@pytest.fixture(scope="module", autouse=True)
def one_engine() -> Iterator[None]:
    """Loaded once: what is tested is what is written, and by whom."""
    with pytest.MonkeyPatch.context() as patched:
        loaded = cache(lambda *_: engine_of(job(Path("."), Path("."))))
        for module in (shards, pipeline):
            patched.setattr(module, "engine_of", lambda _: loaded())
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        (folder / f"{i}.py").write_text("".join(f"def f{i}_{j}(x):\n    return x + {j}\n\n" for j in range(30)))
    return folder


def job(text: Path, work: Path) -> Job:
    """Ten rows and five, in groups of four."""
    options = TrainOptions(data=[text], work=work, rows=10, held_out=5, prompt=12, length=20)
    return replace(options.job("medusa", None), slots=1)


def contents(work: Path) -> dict[str, bytes]:
    """Every file below `work` by its relative name."""
    return {p.relative_to(work).as_posix(): p.read_bytes() for p in sorted(work.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("rows", "group", "count"), [(10, 4, 4), (64, 64, 3), (800, 64, 5), (1, 4, 1), (1000, 7, 13)])
def test_spans_cover_every_row_once_and_begin_with_groups(rows: int, group: int, count: int) -> None:
    spans = [span_of(rows, group, i, count) for i in range(count)]
    assert [r for s in spans for r in s] == list(range(rows))
    assert all(s.start % group == 0 for s in spans if len(s))
    filled = [-(-len(s) // group) for s in spans]
    assert max(filled) - min(filled) <= 1


def test_four_shards_equal_one_process_also_when_a_worker_dies(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(job(text, tmp_path / "one"), silent)
    four = job(text, tmp_path / "four")

    class KilledError(Exception):
        """Stands for a kill: nothing after it is done."""

    def dies(*_: object, **__: object) -> None:
        raise KilledError

    with monkeypatch.context() as patched:  # between its text and its hidden states
        patched.setattr(shards, "write_hidden", dies)
        with pytest.raises(KilledError):
            write_shard(four, 1, 4, silent)
    with pytest.raises(ConfigError, match="no such shard"):
        merge(four, 4, silent)
    manifests = {i: write_shard(four, i, 4, silent) for i in (2, 0, 1, 3)}
    assert write_shard(four, 1, 4, silent) == manifests[1]  # a second attempt finds it, and leaves no trace
    rows = sorted(tuple(m["training"]["rows"]) for m in manifests.values())
    assert rows[0][0] == 0 and rows[-1][1] == 10
    merge(four, 4, silent)
    assert contents(tmp_path / "four") == contents(tmp_path / "one")
    before = contents(tmp_path / "four")
    merge(four, 4, silent)
    assert contents(tmp_path / "four") == before


def test_a_damaged_shard_is_refused(text: Path, tmp_path: Path) -> None:
    two = job(text, tmp_path)
    for i in range(2):
        write_shard(two, i, 2, silent)
    victim = next(tmp_path.glob("data/training-*.shards-2/shard-1/tokens.npy"))
    whole = bytearray(victim.read_bytes())
    whole[-1] ^= 1
    victim.write_bytes(bytes(whole))
    with pytest.raises(ConfigError, match="damaged"):
        merge(two, 2, silent)
