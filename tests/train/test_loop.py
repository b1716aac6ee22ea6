"""The loop: kill it anywhere, continue, and get the same bits; refuse what it cannot trust."""

import dataclasses
import itertools
import json
import math
import time

import numpy as np
import pytest
import torch

from outrider.errors import ConfigError
from outrider.train import losses, metrics
from outrider.train.checkpoint import CheckpointError, checkpoints, load_latest, save_checkpoint, verify
from outrider.train.data import Batches
from outrider.train.features import DataSpec
from outrider.train.loop import DivergedError, LoopConfig, learning_rate, train

CONFIG = LoopConfig(steps=12, lr=1e-2, warmup=2, save_every_s=0.0, log_every=5)
BATCHES = Batches(np.random.default_rng(0).integers(0, 32, 2000).astype(np.uint16), rows=2, length=8)


class Killed(BaseException):
    """Stands for a signal: nothing may catch it."""


def tiny() -> torch.nn.Module:
    """Embedding, dropout (so that random state matters), a gain, and a head."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(32, 16), torch.nn.Dropout(0.2), torch.nn.LayerNorm(16), torch.nn.Linear(16, 32)
    )


def loss_of(model, batch, progress):
    return losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:])


def run(folder, batch_of=BATCHES, config=CONFIG, **options):
    model = tiny()
    state = train(model, batch_of, loss_of, config, folder, report=lambda line: None, **options)
    return model.state_dict(), state


def killed_at(step):
    def batch_of(number):
        if number == step:
            raise Killed
        return BATCHES(number)

    return batch_of


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("lr", math.nan), ("lr", math.inf), ("lr", 0.0), ("save_every_s", math.nan), ("save_every_s", -1.0)],
)
def test_settings_that_would_spoil_or_lose_a_training_are_refused(name: str, wrong: float) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(CONFIG, **{name: wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [1, 7, 11])
def test_killed_and_continued_is_bit_identical(tmp_path, step):
    whole, _ = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "parts", killed_at(step))
    parts, state = run(tmp_path / "parts")
    assert state["step"] == 12
    assert state["tokens"] == 12 * 2 * 8
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_killed_long_after_a_checkpoint_repeats_the_lost_steps(tmp_path):
    rarely = dataclasses.replace(CONFIG, save_every_s=3600.0)
    whole, _ = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "parts", killed_at(9), rarely)
    parts, _ = run(tmp_path / "parts", config=rarely)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_evaluation_leaves_no_trace(tmp_path):
    plain, _ = run(tmp_path / "plain")
    watched, state = run(tmp_path / "watched", evaluate=lambda model: {"x": 1.0})
    assert state["history"][-1] == {"step": 12, "x": 1.0}
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())


def test_measuring_takes_a_tenth_of_the_time_at_most(tmp_path):
    """A measurement that takes as long as ten steps is not made at every checkpoint, and always at the end."""

    def slow_batches(number):
        time.sleep(0.002)
        return BATCHES(number)

    def slow(model):
        time.sleep(0.02)
        return {"x": 1.0}

    config = dataclasses.replace(CONFIG, steps=60)
    _, state = run(tmp_path, batch_of=slow_batches, config=config, evaluate=slow)
    assert state["history"][-1]["step"] == 60
    assert 2 <= len(state["history"]) <= 40
    assert len(checkpoints(tmp_path)) > 1, "checkpoints are written all the same"


def test_corrupt_checkpoint_is_detected_and_the_one_before_it_used(tmp_path):
    whole, _ = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "parts", killed_at(6))
    newest = checkpoints(tmp_path / "parts")[-1]
    path = newest / "model.safetensors"
    spoiled = bytearray(path.read_bytes())
    spoiled[-1] ^= 1
    path.write_bytes(spoiled)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        verify(newest)
    with pytest.warns(UserWarning, match="skipped"):
        parts, _ = run(tmp_path / "parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_all_corrupt_is_an_error_and_none_is_not(tmp_path):
    assert load_latest(tmp_path) is None
    path = save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(2)}}, {})
    (path / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(CheckpointError, match="all 1 checkpoints"):
        load_latest(tmp_path)


def test_half_written_checkpoint_is_not_seen(tmp_path):
    save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(2)}}, {})
    (tmp_path / ".tmp-step-00000002-1").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000001"]


def test_only_the_newest_are_kept(tmp_path):
    for step in range(5):
        save_checkpoint(tmp_path, step, {"model": {"a": torch.ones(2)}}, {}, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def test_nan_stops_before_a_weight_is_spoiled(tmp_path):
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DivergedError, match="step 0"):
        train(model, BATCHES, lambda m, b, p: loss_of(m, b, p) * float("nan"), CONFIG, tmp_path, report=lambda s: None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert load_latest(tmp_path) is None


def test_other_settings_do_not_continue_a_run(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, killed_at(3))
    with pytest.raises(ConfigError, match="lr"):
        run(tmp_path, config=dataclasses.replace(CONFIG, lr=2e-2))


def test_a_run_may_grow_and_not_shrink(tmp_path):
    """What is there is kept; the longer run goes on from it under its own learning rate."""
    run(tmp_path)
    said, longer = [], dataclasses.replace(CONFIG, steps=18)
    state = train(tiny(), BATCHES, loss_of, longer, tmp_path, report=said.append)
    assert state["step"] == 18 and state["tokens"] == 18 * 2 * 8
    assert "continuing from step-00000012" in said and any("12 steps grows to 18" in line for line in said)
    with pytest.raises(ConfigError, match="other settings of steps"):
        run(tmp_path)


def test_metrics_are_passed_on_as_they_are_printed(tmp_path):
    seen, said = [], []
    logs = [lambda step, values: seen.append((step, dict(values)))]
    train(
        tiny(), BATCHES, loss_of, CONFIG, tmp_path, lambda model: {"accept_1": 0.5, "accept_2": 0.25}, said.append, logs
    )
    lines = [values for step, values in seen if "loss" in values]
    assert [step for step, values in seen if "loss" in values] == [5, 10]
    assert all(set(v) == {"loss", "lr", "tokens_per_second", "minutes_left"} for v in lines)
    assert (12, {"accept_1": 0.5, "accept_2": 0.25}) in seen
    assert any("accept 0.50 0.25" in line and "min left" in line for line in said)


def test_a_place_for_metrics_is_checked_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        metrics.check(("wanbd",))
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        metrics.loggers(tmp_path, ("tensorboard",))
    (log,) = metrics.loggers(tmp_path)
    log(3, {"loss": 1.5})
    assert json.loads((tmp_path / metrics.FILE).read_text()) == {"step": 3, "loss": 1.5}


def test_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError, match="warmup"):
        LoopConfig.from_dict({"steps": 1, "lr": 0.1, "warmpu": 3})


def test_schedule_starts_small_peaks_and_ends_at_the_ratio():
    config = LoopConfig(steps=100, lr=1.0, warmup=10, final_lr_ratio=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


@pytest.mark.parametrize(("field", "value", "said"), [
    ("steps", 0, "steps of training are 1 or more, got 0"),
    ("lr", math.nan, "learning rate must be above 0 and finite, got nan"),
    ("lr", -1.0, "learning rate must be above 0 and finite, got -1"),
    ("final_lr_ratio", 2.0, "final_lr_ratio must be from 0 to 1, got 2"),
])  # fmt: skip
def test_a_setting_that_cannot_be_is_named(field: str, value: float, said: str):
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(CONFIG, **{field: value})


def test_a_row_shorter_than_its_beginning_is_refused_in_words():
    with pytest.raises(ConfigError, match="^a row of 16 tokens cannot begin with 64 of the text: with 1 to 16$"):
        DataSpec(rows=8, prompt=64, length=16)
