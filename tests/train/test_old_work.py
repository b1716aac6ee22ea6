"""A work folder of the first release opens unchanged: its data are found again, its trainings go on, its drafters are the same.

`old_work` was made before methods had modules of their own (commit 5423a2c): a tiny target, four texts, the data of five trainings,
and checkpoints of two of them that were stopped after 2 steps of 4. `expected.json` holds what that code came to.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from outrider.train.job import Job
from outrider.train.loop import LoopConfig
from outrider.train.methods.registry import METHODS
from outrider.train.pipeline import run

OLD = Path(__file__).with_name("old_work")
EXPECTED: dict[str, dict[str, Any]] = json.loads((OLD / "expected.json").read_text())
OWN: dict[str, dict[str, Any]] = {
    "medusa": {"loss": "kl"},
    "eagle": {"taps": (1, 2)},
    "eagle1": {},
    "dflash": {"anchors": 4, "objective": "chain"},
    "draft": {"width": 32},
}
STOPPED = ("medusa", "dflash")


def job(kind: str, folder: Path) -> Job:
    return Job(
        kind=kind, target=folder / "target", data=(folder / "text",), pattern="*.txt", work=folder / "work",
        out=folder / "out", loop=LoopConfig(steps=4, lr=1e-2, warmup=1, save_every_s=0.0), rows=6, held_out=2, prompt=8,
        length=24, batch=3, levels=2, slots=2, **OWN[kind],
    )  # fmt: skip


def test_every_method_is_in_the_old_folder() -> None:
    assert set(EXPECTED) == set(OWN) <= set(METHODS)


@pytest.mark.parametrize("kind", list(OWN))
def test_an_old_work_folder_opens_unchanged(kind: str, tmp_path: Path) -> None:
    folder, want, said = tmp_path / "old", EXPECTED[kind], list[str]()
    shutil.copytree(OLD, folder)
    before = {p for p in (folder / "work").rglob("*") if "step-" not in str(p)}
    found = run(job(kind, folder), said.append)
    after = {p for p in (folder / "work").rglob("*") if "step-" not in str(p) and p.name != "metrics.jsonl"}
    assert after == before, "data or a training were looked for under another name"
    assert (folder / "work" / kind / want["run"]).is_dir()
    assert not [line for line in said if line.startswith(("text:", "hidden states:"))], "data were written again"
    assert ("continuing from step-00000002" in said) is (kind in STOPPED)
    assert found.pop("drafter") == kind
    assert found.pop("seconds") > 0 and 0 < found.pop("computing") <= 1
    assert found.pop("greedy") >= 1  # since then measured too
    assert found == pytest.approx({k: v for k, v in want["measured"].items() if k != "drafter"}, rel=1e-3, abs=1e-4)
    tensors = load_file(folder / "out" / "model.safetensors")
    assert sorted(tensors) == sorted(want["weights"])
    for name, (total, squares) in want["weights"].items():
        x = tensors[name].double()
        assert x.square().sum().item() == pytest.approx(squares, rel=1e-2), name
        assert x.sum().item() == pytest.approx(total, rel=1e-2, abs=1e-2 * squares**0.5 + 1e-3), name
    theirs = json.loads((folder / "out" / "config.json").read_text())
    if kind in ("eagle", "dflash"):  # since then it names its target
        assert theirs["speculators_config"]["verifier"].pop("name_or_path") == str(folder / "target")
        want["config"]["speculators_config"]["verifier"].pop("name_or_path")
    if kind == "eagle1":
        assert theirs.pop("base_model") == str(folder / "target")
        want["config"].pop("base_model", None)
    assert theirs | {"transformers_version": ""} == want["config"] | {"transformers_version": ""}
