"""Drafters in a process of their own: the same drafts, whatever becomes of the process."""

from __future__ import annotations

import gc
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from outrider.build import build_engine
from outrider.drafters.ahead import Ahead
from outrider.drafters.apart import Apart, Host, Lost
from outrider.drafters.apart_child import packed, write
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.ngram import NGram
from outrider.drafters.registry import load_drafter
from outrider.errors import CapabilityError, ConfigError
from outrider.options import EngineOptions
from outrider.params import SamplingParams
from outrider.protocols import Drafter
from outrider.records import CacheNeed
from tests.checkpoints import make_checkpoint
from tests.contract.drafters import host
from tests.drafters.test_ahead import LENGTH, draft_model, run
from tests.nn.test_shares import TARGET as LEAN


def alone() -> Drafter:
    return ModelDrafter(draft_model(), LENGTH)


@cache
def plain() -> tuple[list[list[int]], int]:
    texts, engine = run(alone())
    return texts, engine.counts.accepted


def beside(make: Callable[[], Drafter], where: Host | None = None) -> Apart:
    return Apart(make, alone(), host() if where is None else where)


MAKERS = {
    "model": partial(ModelDrafter, draft_model(), LENGTH),
    "ahead": partial(Ahead, ModelDrafter(draft_model(), LENGTH + 1), 4),
    "ahead-inline": partial(Ahead, ModelDrafter(draft_model(), LENGTH + 1), 4, inline=True),
}


def test_attributes_and_memory_are_the_drafters() -> None:
    made = MAKERS["ahead"]()
    drafter = beside(MAKERS["ahead"])
    assert drafter.name == f"apart:{made.name}"
    assert (drafter.max_depth, drafter.max_nodes, drafter.trees, drafter.layers) == (LENGTH, LENGTH, False, ())
    assert drafter.cache_need(2, 100) == made.cache_need(2, 100)  # type: ignore[attr-defined]


def test_a_question_that_is_not_read_is_given_up_too() -> None:
    """It is larger than what a pipe holds."""
    one = Host(1.0)
    os.kill(one.pid, signal.SIGSTOP)
    with pytest.raises(Lost, match="no answer within 1 s"):
        one.ask(0, "draft", bytes(1 << 20))
    with pytest.raises(Lost, match="ended with code -9"):
        one.ask(0, "draft", None)


def test_it_ends_with_its_parent_in_the_middle_of_an_answer() -> None:
    """Of a parent that is killed nothing is left but closed pipes: one that waits for a pass to end waits here for hours."""
    reader, writer = os.pipe()
    command = [sys.executable, "-c", f"from outrider.drafters.apart_child import main; main({writer})"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(writer,)) as process:
        assert process.stdin is not None
        os.close(writer)
        try:
            write(process.stdin, packed((0, "make", partial(time.sleep, 10_000), [])))  # type: ignore[arg-type]
            process.stdin.close()
            os.close(reader)
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_an_interrupt_leaves_no_answer_for_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Host()
    drafter = beside(MAKERS["model"], one)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(selectors.DefaultSelector, "select", interrupted)
        with pytest.raises(KeyboardInterrupt):
            drafter.bind(2, 30)
    assert run(drafter)[0] == plain()[0]  # here
    assert drafter.pid is None


def test_what_cannot_be_made_there_is_refused_by_name() -> None:
    with pytest.raises(CapabilityError, match="could not be made in a process of its own .*drop 'apart:'"):
        beside(lambda: alone())  # a function that has no name elsewhere
    with pytest.raises(CapabilityError, match="4 levels where its stand-in drafts 3"):
        beside(partial(NGram, 4))
    for spec, kind in (("apart:early:1", "early"), ("apart:sparse:int8", "sparse"), ("apart:eagle:PATH", "eagle")):
        with pytest.raises(CapabilityError, match=f"only draft models run in a process of their own, not '{kind}'"):
            load_drafter(spec, target=LEAN, length=3)
    with pytest.raises(ConfigError, match="takes no prefix: write 'ngram', got 'apart:ngram'"):
        load_drafter("apart:ngram", target=LEAN, length=3)
    for spec in ("ahead:4:apart:PATH", "greedy:apart:PATH", "apart:greedy:ahead:4:PATH", "apart:apart:PATH"):
        with pytest.raises(ConfigError, match="stand first, in this order, as in 'apart:ahead:4:greedy:PATH'"):
            load_drafter(spec, target=LEAN, length=3)


def test_a_part_of_the_target_is_refused_before_there_is_one() -> None:
    for spec in ("apart:early:1", "apart:greedy:early:1", "ngram+apart:ahead:4:sparse:window:16+496"):
        with pytest.raises(CapabilityError, match="only draft models run in a process of their own"):
            EngineOptions(draft=spec)
    for spec in ("apart:ahead:4:PATH", "apart:./early", "early:1", "ngram+early:1"):
        assert EngineOptions(draft=spec).draft == spec


class Unreadable:
    """Can be written down; reading it fails."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return int, ("no number",)


class Answering(NGram):
    """A drafter whose `bind` answers what `make` returns."""

    def __init__(self, make: Callable[[], object]) -> None:
        super().__init__(LENGTH)
        self.make = make

    def bind(self, slots: int, length: int) -> Any:
        """Anything."""
        return self.make()


@pytest.mark.parametrize(
    ("make", "said"), [(threading.Lock, "cannot pickle"), (Unreadable, "cannot be read: ValueError")]
)
def test_an_answer_that_cannot_be_sent_costs_nothing_but_speed(make: Callable[[], object], said: str) -> None:
    """It cannot be written down there, or not be read here: the process goes on, and this drafter is lost."""
    one = host()
    number, _ = one.make(partial(Answering, make))  # type: ignore[arg-type]
    with pytest.raises(Lost, match=said):
        one.ask(number, "bind", (1, 10))
    assert one.ask(number, "cache_need", (1, 10)) == CacheNeed()
    drafter = beside(partial(Answering, make), one)  # type: ignore[arg-type]
    assert run(drafter)[0] == plain()[0]
    assert drafter.pid is None and any(said in notice for notice in drafter.notices)
    assert one.ask(number, "cache_need", (1, 10)) == CacheNeed()


def test_what_is_printed_before_it_begins_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As start-up files of a machine's Python may do, which run before any line of ours."""
    (tmp_path / "sitecustomize.py").write_text("print('welcome to this machine', flush=True)")
    monkeypatch.syspath_prepend(str(tmp_path))
    number, own = Host(patience=60.0).make(partial(NGram, LENGTH))
    assert (number, own["max_depth"]) == (0, LENGTH)


@pytest.mark.parametrize("spec", ["apart:ahead:4:{}", pytest.param("apart:greedy:{}", marks=pytest.mark.slow)])
def test_by_its_name(spec: str, tmp_path: Path) -> None:
    """A process of its own loads the folder as the engine does, and ends with it; a request with a grammar decodes plainly."""
    target = make_checkpoint(tmp_path / "target", "llama", tokenizer=True)
    draft = make_checkpoint(tmp_path / "small", "llama", seed=0, num_hidden_layers=1, tokenizer=True)
    asked = [SamplingParams(temperature=0.9, max_tokens=12, seed=n, ignore_eos=True) for n in range(3)]
    texts = []
    for name in (spec.removeprefix("apart:").removeprefix("ahead:4:").format(draft), spec.format(draft)):
        one = build_engine(target, name, length=3, dtype="float32", slots=2)
        texts.append([r.outputs[0].token_ids for r in one.generate(["the line", "a", "of many"], asked)])
        assert one.counts.proposed > 20
    assert texts[0] == texts[1]
    before = one.counts.proposed
    (found,) = one.generate(["the"], SamplingParams(temperature=0.0, max_tokens=8, grammar="regex:[ab]*"))
    assert one.counts.proposed == before
    assert set(found.outputs[0].text) <= set("ab")
    assert not [n for n in one.notices if "process" in n]
    pid = one.parts.drafter.pid  # type: ignore[attr-defined]
    os.kill(pid, 0)
    del one
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
