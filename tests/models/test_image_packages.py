"""What is said when the packages that a processor needs are missing, or do not fit each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoProcessor

from outrider.errors import CapabilityError
from outrider.models import images

assert AutoProcessor  # before a torchvision is put in its way


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose processor cannot be loaded, whatever is installed."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "NoSuchProcessor"}))
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(CapabilityError) as failure:
        images.processor_of(folder)
    return str(failure.value)


def installed(monkeypatch, place: Path, code: str) -> None:
    """A torchvision that runs `code` when it is imported."""
    (place / "torchvision").mkdir(parents=True)
    (place / "torchvision" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)


def test_a_torchvision_of_another_build_is_named_with_the_remedy(folder: Path, monkeypatch, tmp_path: Path) -> None:
    installed(monkeypatch, tmp_path / "site", "raise RuntimeError('operator torchvision::nms does not exist')")
    said = refused(folder)
    assert "torchvision is of another build than PyTorch" in said
    assert "nms does not exist" in said
    assert said.endswith(images.REINSTALL)


def test_one_that_works_is_not_blamed(folder: Path, monkeypatch, tmp_path: Path) -> None:
    installed(monkeypatch, tmp_path / "site", "")
    assert "torchvision" not in refused(folder)


def test_one_that_is_missing_is_named(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None if name == "torchvision" else object())
    assert "torchvision is not installed" in refused(folder)
