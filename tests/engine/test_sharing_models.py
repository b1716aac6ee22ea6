"""Engines on one target share a draft model exactly if they would load the same one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from outrider.assets import shipped
from outrider.build import Engine, build_engine, companion
from outrider.errors import ConfigError
from outrider.models import token_use
from outrider.options import EngineOptions

OTHER = {"implementation": "hf", "draft_quantize": "int8"}
SHARED = {
    "length": 2,
    "slots": 1,
    "rule": "match",
    "max_length": 64,
    "chunk": 32,
    "prefix_cache": False,
    "kv_memory": 1.0,
    "allow_lossy": True,
    "lengths": "bass",
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return build_engine(draft="none", slots=2, max_length=96)


def model_of(engine: Engine, draft: Path | str, **changes: object) -> object:
    return companion(engine, str(draft), **changes).parts.drafter.model  # type: ignore[attr-defined]


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return Path(shutil.copytree(shipped("draft"), tmp_path / "draft"))


def test_what_decides_the_model_and_what_does_not(engine: Engine, draft: Path) -> None:
    """Option by option: a new one must be put into one of the tables."""
    fixed = {"draft", "target", "dtype", "device", "target_quantize", "kv_dtype", "input_bits"}
    fixed |= {"draft_vocabulary"}  # counted, so in a test of its own
    assert set(OTHER) | set(SHARED) | fixed == set(EngineOptions.__dataclass_fields__)
    first = model_of(engine, draft)
    for name, value in SHARED.items():
        assert model_of(engine, draft, **{name: value}) is first, name
    for name, value in OTHER.items():
        assert model_of(engine, draft, **{name: value}) is not first, name


def test_another_training_in_the_same_folder_is_another_model(engine: Engine, draft: Path) -> None:
    first = model_of(engine, draft)
    assert model_of(engine, draft) is first
    weights = draft / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    second = model_of(engine, draft)
    assert second is not first
    config = draft / "config.json"
    config.write_text(config.read_text() + "\n")
    assert model_of(engine, draft) is not second


def test_one_name_in_two_folders_is_two_models(
    engine: Engine, draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = model_of(engine, "draft")
    (tmp_path / "b").mkdir()
    shutil.copytree(draft, tmp_path / "b" / "draft", copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path / "b")
    assert model_of(engine, "draft") is not first


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "float64"}, {"device": "meta"}, {"target": "another"}, {"target_quantize": "q8_0"}, {"input_bits": 16}],
)
def test_what_the_loaded_target_has_decided_cannot_change(engine: Engine, changes: dict[str, str]) -> None:
    """It would be dropped in silence: the companion has the weights that are there."""
    with pytest.raises(ConfigError, match="fixed when the target was loaded"):
        companion(engine, "none", **changes)
    assert companion(engine, "none", dtype="auto").parts.target is engine.parts.target


def test_each_number_of_tokens_of_a_head_is_a_model_of_its_own(
    engine: Engine, draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(token_use, "TOKENS", 2)
    monkeypatch.setattr(token_use, "count", lambda target, prompts, made=token_use.count: made(target, prompts[:2], 2))
    first = model_of(engine, draft, draft_vocabulary=1024)
    assert model_of(engine, draft, draft_vocabulary="1024") is first
    assert model_of(engine, draft) is not first
    assert model_of(engine, draft, draft_vocabulary=512) is not first
    with pytest.raises(ConfigError, match="draft_vocabulary"):  # no part of this drafter, whatever others have loaded
        companion(engine, "ngram", draft_vocabulary=1024)
