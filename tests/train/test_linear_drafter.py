"""The example of a learned drafter, added as CONTRIBUTING.md says: trained from text, loaded by its name, served by the engine."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from examples.linear_drafter import DRAFTER, METHOD
from examples.linear_drafter.drafter import LinearDrafter
from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.none import NoDraft
from outrider.drafters.registry import LEARNED, load_drafter
from outrider.errors import CapabilityError, ConfigError
from outrider.models.load import load_target
from outrider.models.toy import TinyLM
from outrider.params import SamplingParams
from outrider.protocols import Drafter
from outrider.train.estimate import estimate
from outrider.train.job import Job
from outrider.train.loop import LoopConfig
from outrider.train.methods.base import MethodOptions
from outrider.train.pipeline import run
from outrider.verify import load_rule
from tests.checkpoints import make_checkpoint

LEVELS = 3
TABLE = {**LEARNED, **DRAFTER}


def job(folder: Path, steps: int, **own: object) -> Job:
    return Job(
        kind=METHOD["linear"], target=folder / "target", data=(folder / "text",), work=folder / "work",
        out=folder / "linear", loop=LoopConfig(steps=steps, lr=2e-2, warmup=1), rows=24, held_out=4, prompt=8, length=24,
        batch=8, levels=LEVELS, slots=8, **own,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float], dict[str, float]]:
    """A folder with target, text and drafter; what was measured after one step and at the end."""
    folder = tmp_path_factory.mktemp("linear")
    make_checkpoint(folder / "target", "llama", tokenizer=True, num_hidden_layers=2)
    (folder / "text").mkdir()
    for i in range(8):
        (folder / "text" / f"{i}.txt").write_text("".join(f"line {j} of {i}: {j * i % 7}\n" for j in range(40)))
    before = run(job(folder, 1), lambda _: None)
    return folder, before, run(job(folder, 120), lambda _: None)


def engine(target: object, drafter: Drafter) -> Engine:
    return Engine(target, drafter, load_rule("speculative_sampling"), Fixed(drafter.max_depth), slots=2, max_length=64)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["", "greedy:", "dynamic:5x2:", "tree:2x2:"])
def test_it_is_loaded_by_its_name_and_changes_no_text(trained: tuple, how: str) -> None:
    folder, before, after = trained
    assert after["tokens"] > before["tokens"]
    target = load_target(folder / "target", dtype="float32")
    drafter = load_drafter(f"{how}linear:{folder / 'linear'}", target=target, length=LEVELS, learned=TABLE)
    assert isinstance(drafter, LinearDrafter)
    params = [SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)] * 3
    prompts = [[1, 5, 9], [7, 7], [30, 2, 4, 8]]
    one = engine(target, drafter)
    found, plain = one.generate(prompts, params), engine(target, NoDraft()).generate(prompts, params)
    assert [r.outputs[0].token_ids for r in found] == [r.outputs[0].token_ids for r in plain]
    assert one.counts.proposed > 0


def test_it_is_found_beside_its_target(trained: tuple) -> None:
    folder = trained[0]
    target = load_target(folder / "target", dtype="float32")
    where = str(folder / "target")
    assert load_drafter("linear", target=target, length=9, target_path=where, learned=TABLE).max_depth == LEVELS
    told = load_drafter(str(folder / "linear"), target=target, length=2, learned=TABLE)  # a folder says what it holds
    assert type(told) is type(load_drafter("linear", target=target, length=2, target_path=where, learned=TABLE))
    with pytest.raises(CapabilityError, match="use the drafter of this target"):
        load_drafter(f"linear:{folder / 'linear'}", target=TinyLM(9, 8, 1, heads=1), length=2, learned=TABLE)


def test_its_training_says_what_it_needs_and_refuses_what_it_does_not_read(trained: tuple) -> None:
    folder = trained[0]
    needs = estimate(job(folder, 5))
    assert needs["parameters"] == load_target(folder / "target").hidden_size ** 2
    assert needs["seconds"]["training"] > 0
    with pytest.raises(ConfigError, match="linear does not read anchors, taps; dflash would"):
        job(folder, 5, anchors=3, taps=(1,))
    assert METHOD["linear"].reads <= {f.name for f in fields(MethodOptions)}


def test_what_it_needs_is_measured_on_the_texts_of_the_training(
    trained: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversations stand there as the target's template writes them, and not as their contents."""
    folder, seen = trained[0], list[str]()
    talks = folder / "talks.jsonl"
    talks.write_text(
        json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]})
    )
    monkeypatch.setattr("outrider.train.estimate._seconds_of_text", lambda _, __, text: seen.append(text) or 0.0)
    estimate(replace(job(folder, 5), data=(talks,)))
    assert seen == ["user: hi</s><s>assistant: ho</s>"]
