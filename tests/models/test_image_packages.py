"""What is said when the packages that a processor needs are missing, or do not fit each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoProcessor, GPT2Config

from outrider.errors import CapabilityError
from outrider.models import images
from outrider.models.packages import REINSTALL

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
    assert said.endswith(REINSTALL)


def test_one_that_works_is_not_blamed(folder: Path, monkeypatch, tmp_path: Path) -> None:
    installed(monkeypatch, tmp_path / "site", "")
    assert "torchvision" not in refused(folder)


def test_one_that_is_missing_is_named(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None if name == "torchvision" else object())
    assert "torchvision is not installed" in refused(folder)


BROKEN = """
import json
import os
import sys
from pathlib import Path
import torch  # what both of them need is imported once
from outrider.errors import ConfigError

def looked(what, folder):
    try:
        if what == "run":
            from outrider.models.hf.target import HFTarget
        else:
            from outrider.models.admit import admit
            admit(folder, json.loads((folder / "config.json").read_text()))
    except ConfigError as error:
        return str(error)

for what in ("run", "look"):
    assert "transformers" not in sys.modules
    child = os.fork()
    if not child:
        print(json.dumps([what, looked(what, Path(sys.argv[1]))]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_models_of_transformers_beside_it_are_refused_in_one_sentence(tmp_path: Path) -> None:
    """Each in a process of its own, where nothing of transformers was imported before."""
    site, folder = tmp_path / "site" / "torchvision", tmp_path / "model"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    about = site.parent / "torchvision-0.28.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\\nName: torchvision\\nVersion: 0.28.0\\n")
    GPT2Config(n_embd=32, n_layer=1, n_head=2).save_pretrained(folder)
    path = os.pathsep.join([str(site.parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", BROKEN, str(folder)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    said = dict(map(json.loads, done.stdout.splitlines()))
    assert set(said) == {"run", "look"}
    assert all(text.endswith(REINSTALL) and "\n" not in text for text in said.values())
