"""The table of all families: every one of transformers is in it, every recorded row runs with the same text or is refused in a
sentence, the page is what the rows say, and the doctor agrees with them. The slow tests build every family again, and run it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig

from benchmarks import model_table
from benchmarks.model_page import CHECKS, page, read_rows
from benchmarks.model_sizes import FAMILIES, NEEDS, build
from benchmarks.model_table import doctor, row_of
from outrider.errors import ConfigError
from outrider.models.admit import admit

RECORDED = Path(model_table.__file__).with_name("model_table.jsonl")
ROWS = read_rows(RECORDED)
RAN = [r["family"] for r in ROWS if "path" in r]
ASKED = [r["family"] for r in ROWS if "doctor" in r]
DAILY = ("llama", "gpt_oss", "falcon", "mamba", "roberta", "bart", "musicgen")
"""Of those that the doctor is asked about, one for each of its answers: both runtimes, a state, and three kinds of refusal."""


def recorded(family: str) -> dict[str, Any]:
    """Its row; skips where transformers is of another release than the rows, or a package of the family is missing."""
    pytest.importorskip(NEEDS.get(family, "transformers"))
    row = next(r for r in ROWS if r["family"] == family)
    if row["transformers"] != transformers.__version__:
        pytest.skip("recorded with another release of transformers")
    return row


def test_no_family_of_transformers_is_missing() -> None:
    recorded("llama")
    assert {r["family"] for r in ROWS} == set(FAMILIES)


def test_every_family_was_made() -> None:
    """What could not be made or run small says nothing about a checkpoint of that family."""
    assert not [(r["family"], r.get("made") or r.get("crash")) for r in ROWS if "made" in r or "crash" in r]


def test_no_family_has_another_text() -> None:
    assert len(ROWS) > 120
    assert not [(r["family"], name) for r in ROWS for name in CHECKS if r.get(name) is False]
    drafted = [r for r in ROWS if r.get("drafts", "none") != "none"]
    assert all(r["told_accepted"] and r["told_rejected"] for r in drafted)


def test_no_recorded_speed_is_below_nine_tenths_of_that_of_transformers() -> None:
    assert min(r["speed"] for r in ROWS if "speed" in r) >= 0.9


def test_what_does_not_run_is_refused_in_a_sentence() -> None:
    refused = [r["refused"] for r in ROWS if "refused" in r]
    assert refused
    assert all("\n" not in said and len(said) < 500 for said in refused)


def test_the_doctor_agrees() -> None:
    """Its runtime is the one that ran, and what loading refuses it refuses, in the same sentence.

    All but ShieldGemma 2, whose weights transformers saves under names that it does not find again: only loading shows that.
    """
    said = {r["family"]: r["doctor"] for r in ROWS if "doctor" in r}
    assert {r["family"] for r in ROWS if "path" in r or "refused" in r} == set(said)
    for r in ROWS:
        if "path" in r:
            assert said[r["family"]] == ("lean" if r["path"] in ("native", "lean") else "transformers"), r["family"]
        elif "refused" in r and r["family"] != "shieldgemma2":
            assert said[r["family"]] == f"refused: {r['refused']}", r["family"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", [f if f in DAILY else pytest.param(f, marks=pytest.mark.slow) for f in ASKED])
def test_the_doctor_says_of_a_checkpoint_what_is_recorded(family: str, tmp_path: Path) -> None:
    row = recorded(family)
    build(family).save_pretrained(tmp_path)
    assert doctor(str(tmp_path)) == row["doctor"]


def test_the_page_is_that_of_the_rows() -> None:
    written = Path(__file__).parents[2] / "docs" / "models.md"
    assert written.read_text() == page(ROWS)


@pytest.mark.skipif(find_spec("timm") is not None, reason="nothing is missing where the package is")
def test_a_family_whose_package_is_missing_is_refused_with_the_command_that_installs_it(tmp_path: Path) -> None:
    AutoConfig.for_model("gemma3n").save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"needs another package to run .*gemma3n; .*requires the timm.*: pip install timm$"
    ):
        admit(tmp_path, {"model_type": "gemma3n"})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", RAN)
def test_a_family_runs_as_recorded(family: str) -> None:
    before, row = recorded(family), row_of(family, 24, 0)
    same = ("path", "drafts", "doctor", *CHECKS)
    assert {k: row.get(k) for k in same} == {k: before.get(k) for k in same}
