"""`doctor`'s expected speeds: which part of a model is loaded for it, and how its times become those of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from outrider.cli.doctor import expected, print_speed
from outrider.errors import ConfigError
from outrider.evaluate.planning import pace as measured
from outrider.evaluate.planning.pace import ACCEPTANCES, ROWS, Times, pace
from outrider.models.load import first_blocks, load_target
from outrider.models.native.build import load_library
from outrider.types import Draft, Rows
from tests.gguf_files import make_pair

pytestmark = pytest.mark.skipif(load_library() is None, reason="the compiled decoder needs a C++ compiler")
SHAPE = {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 4, "dtype": torch.bfloat16}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder and the GGUF file made of it."""
    return make_pair(tmp_path_factory.mktemp("pace"), "llama", "q8_0", **SHAPE)


@pytest.mark.parametrize("kind", [0, 1], ids=["folder", "GGUF"])
def test_the_first_blocks_are_those_of_the_model(kind: int, made: tuple[Path, Path]) -> None:
    """One block, some, all: hidden states behind them are the whole model's, and the share grows with them to 1."""
    whole = load_target(made[kind], dtype="bfloat16")
    rows = Rows.assemble([0], [[5, 6, 7]], [0], Draft.empty(1))
    hidden = whole.forward(rows, whole.new_kv(1, 8), layers=(1, 2, 3, 4)).hidden
    shares = []
    block = whole.config.block_numbers * (2 if kind == 0 else 34 / 32)  # type: ignore[attr-defined]
    for count, size in ((1, 1), (2, 2.5 * block), (4, 1e9)):
        part, share = first_blocks(made[kind], int(size), dtype="bfloat16")  # type: ignore[misc]
        assert part.layers == count
        found = part.forward(rows, part.new_kv(1, 8), layers=(count,)).hidden[0]
        assert torch.equal(found, hidden[count - 1])
        shares.append(share(1))
        assert share(8) == share(1)
    assert 0 < shares[0] < shares[1] < shares[2] == 1


def test_the_rest_costs_as_much_a_byte() -> None:
    times = Times({n: 4.0 * n for n in ROWS}, {n: 1.0 * n for n in ROWS})
    assert [times.more(n) for n in (1, 2, 5, 7, 8)] == pytest.approx([3, 6, 15, 21, 24])


@pytest.mark.parametrize(("second", "disturbed"), [(1.0, False), (0.95, False), (0.8, True)])
def test_times_that_contradict_each_other_are_told(
    second: float,
    disturbed: bool,
    made: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two rows cannot take less than one of them: then a neighbour had the cores, and no figure of these is one of the model."""
    times = Times({n: 1.0 if n == 1 else second * n**0.01 for n in ROWS}, dict.fromkeys(ROWS, 0.5))
    monkeypatch.setattr(measured, "timed", lambda model, share: (times, {}))
    monkeypatch.setattr(measured, "SECONDS", 0.0)
    told = expected({"target": str(made[1])}, "auto")
    assert told["disturbed"] == disturbed
    print_speed(told)
    assert ("Run it again" in " ".join(capsys.readouterr().out.split())) == disturbed


def test_a_pair_is_told_by_acceptance(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "SECONDS", 0.0)
    found = pace(made[1], made[1])
    assert not isinstance(found, str) and found.tokens > 0
    speeds = [found.drafted[a][0] for a in ACCEPTANCES]
    assert speeds == sorted(speeds) and speeds[0] > 0
    assert pace(made[1], None).drafted == {}  # type: ignore[union-attr]


def test_a_draft_that_cannot_be_measured_is_said_and_the_target_told(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "SECONDS", 0.0)
    _, short = make_pair(tmp_path, "llama", "q8_0", max_position_embeddings=32)
    found = pace(made[1], short)
    assert not isinstance(found, str) and found.tokens > 0 and found.drafted == {}
    assert found.unmeasured == "its context of 32 tokens is too short to measure"
    told = expected({"target": str(made[1]), "draft": str(short)}, "auto")
    assert told["draft_unknown"] == found.unmeasured and told["with_draft"] == []


def test_what_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, short = make_pair(tmp_path, "llama", "q8_0", max_position_embeddings=32)
    assert "too short" in str(pace(short, None))
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")
    assert "compiled decoder" in str(pace(short, None))
    with pytest.raises(ConfigError):
        pace(tmp_path / "nothing", None)
