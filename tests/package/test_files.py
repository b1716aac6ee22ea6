"""Files of others are read within bounds, files of ours are written whole; values of configurations within theirs."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from outrider.config_keys import flag, packed_key, real, whole
from outrider.errors import ConfigError
from outrider.files import read_json, read_weight_map, write_whole


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"a": 1}', None),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe{", "cannot be read as JSON"),
        (b"[" * 900, "cannot be read as JSON"),
        (b"[1]", "does not hold a JSON object"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "is larger than"),
        (None, "is missing"),
    ],
)
def test_an_object_within_its_bound_and_nothing_else(tmp_path: Path, content: bytes | None, found: str | None) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    if found is None:
        assert read_json(path, 1000) == {"a": 1}
    else:
        with pytest.raises(ConfigError, match=found):
            read_json(path, 1000)


def test_a_weight_index_names_files(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "x.safetensors"}}')
    assert read_weight_map(index, 1000) == {"a": "x.safetensors"}
    for wrong in ("{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'):
        index.write_text(wrong)
        with pytest.raises(ConfigError, match="no weight_map of file names"):
            read_weight_map(index, 1000)


def test_a_reader_sees_the_old_file_or_the_whole_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.json"
    write_whole(path, b"old")
    left = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    left.write_bytes(b"of a process that was killed")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == [path.name]

    def full(old: object, new: object) -> None:
        assert path.read_bytes() == b"new"  # what was there is there until the last moment
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\)"):
        write_whole(path, b"newer")
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == [path.name]


def test_numbers_and_flags_within_their_bounds() -> None:
    raw = {"n": 3, "x": 0.5, "yes": True, "zero": 0, "null": None, "word": "3", "nan": math.nan, "big": 1 << 30}
    assert whole(raw, "n", "here") == 3 and whole(raw, "absent", "here", default=7) == 7
    assert whole(raw, "null", "here", default=7, null=5) == 5 and whole(raw, "zero", "here", least=0) == 0
    for key in ("x", "yes", "zero", "null", "word", "big", "absent"):
        with pytest.raises(ConfigError, match=f"here: {key} must be a whole number from 1 to 16777216"):
            whole(raw, key, "here", default=None)
    assert real(raw, "x", "here") == 0.5 and real(raw, "zero", "here", least=0.0) == 0.0
    assert real(raw, "absent", "here", 0.25) == 0.25 and real(raw, "null", "here", 1.0, null=0.5) == 0.5
    for key in ("n", "yes", "zero", "null", "word", "nan"):
        with pytest.raises(ConfigError, match=f"here: {key} must be a number above 0, at most 1"):
            real(raw, key, "here")
    with pytest.raises(ConfigError, match="n must be a number from 4 to 8"):
        real(raw, "n", "here", least=4.0, most=8.0)
    assert flag(raw, "yes", "here") and flag(raw, "null", "here", True) and not flag(raw, "absent", "here")
    with pytest.raises(ConfigError, match="zero must be true or false"):
        flag(raw, "zero", "here")
    assert (
        packed_key({"quantization": None}) is None and packed_key({"quantization_config": {}}) == "quantization_config"
    )
