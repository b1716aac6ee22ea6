"""A step reads from an accelerator seldom: once to verify chains, and once a level of a draft model.

Every conversion of a tensor to numbers of the host is counted, on the CPU too, while all that has a way of its own on an
accelerator takes it. The models of the tests are on the CPU and convert as they like: what happens inside a forward is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from outrider import transfer
from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.drafters.tree.growth import BestFirst
from outrider.models.toy import TableTarget
from outrider.params import SamplingParams
from outrider.protocols import Drafter
from outrider.verify import best_exact, load_rule

CONVERSIONS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
VOCAB = 16


class Reads:
    """Conversions so far, but for those inside `uncounted`."""

    def __init__(self) -> None:
        self.count, self.off = 0, False

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        before, self.off = self.off, True
        try:
            yield
        finally:
            self.off = before

    def watched(self, inner: Callable[..., Any], counts: int) -> Callable[..., Any]:
        """`inner`, a call of which counts so many, whatever it does."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 0 if self.off else counts
            with self.uncounted():
                return inner(*args, **kwargs)

        return call


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Counts while everything takes the ways of an accelerator."""
    out = Reads()
    for name in CONVERSIONS:
        monkeypatch.setattr(Tensor, name, out.watched(getattr(Tensor, name), 1))
    monkeypatch.setattr(TableTarget, "forward", out.watched(TableTarget.forward, 0))
    monkeypatch.setattr(transfer, "on_host", lambda x: False)
    return out


def of_a_step(reads: Reads, drafter: Drafter, rule: str, sequences: int, depth: int, **params: Any) -> set[int]:
    """How many reads each of ten steps takes, in the middle of texts that all draft."""
    model = TableTarget.random(VOCAB, seed=3, sharp=2.0)
    chosen = best_exact(drafter) if rule == "auto" else load_rule(rule)
    engine = Engine(model, drafter, chosen, Fixed(depth), slots=sequences, max_length=200)
    for i in range(sequences):
        engine.submit([1, 2, 3, 1, 2, 3 + i % 5], SamplingParams(max_tokens=150, ignore_eos=True, seed=i, **params))
    for _ in range(3):
        engine.step()
    found = set()
    for _ in range(10):
        before = reads.count
        engine.step()
        found.add(reads.count - before)
    assert not engine.defects
    return found


def draft_model(depth: int, **options: Any) -> ModelDrafter:
    return ModelDrafter(TableTarget.random(VOCAB, seed=3, sharp=2.0).perturbed(0.3, seed=7), depth, **options)


@pytest.mark.parametrize("sequences", [1, 8])
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("rule", ["auto", "speculative_sampling", "block", "traversal", "optimal_transport"])
@pytest.mark.parametrize(
    "params", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}, {"temperature": 0.0}]
)
def test_chains_of_a_draft_model_are_read_once_and_once_a_level(
    reads: Reads, sequences: int, depth: int, rule: str, params: dict[str, float]
) -> None:
    assert of_a_step(reads, draft_model(depth), rule, sequences, depth, **params) == {1 + depth}


@pytest.mark.parametrize("sequences", [1, 8])
@pytest.mark.parametrize("drafter", [NoDraft(), NGram(4)], ids=lambda d: d.name)
def test_what_is_drafted_on_the_host_is_not_read(reads: Reads, sequences: int, drafter: Drafter) -> None:
    assert of_a_step(reads, drafter, "auto", sequences, 4, temperature=1.0) == {1}


@pytest.mark.parametrize("grow", ["iid", "without_replacement", "hub", "coupled", "dynamic"])
def test_trees_are_drawn_with_one_read_a_level(reads: Reads, monkeypatch: pytest.MonkeyPatch, grow: str) -> None:
    """Trees are verified on the host, row by row; drawing them takes one read a level whatever their width."""
    width = 2 if grow == "hub" else 3
    if grow == "dynamic":
        drafter = draft_model(3, growth=BestFirst(6, 3, VOCAB, width=3))
    elif grow == "coupled":
        drafter = draft_model(3, branching=(width, 2, 1), sample="coupled")
    else:
        drafter = draft_model(3, branching=(width, 2, 1), siblings=grow)
    drafting: list[int] = []
    inner = drafter.draft

    def draft(*args: Any) -> Any:
        before = reads.count
        made = inner(*args)
        drafting.append(reads.count - before)
        return made

    monkeypatch.setattr(drafter, "draft", draft)
    of_a_step(reads, drafter, "match" if grow == "coupled" else "auto", 4, 3, temperature=1.0)
    assert max(drafting) == 3


def test_log_probabilities_are_one_read_a_sequence(reads: Reads) -> None:
    assert of_a_step(reads, draft_model(2), "auto", 3, 2, temperature=1.0, logprobs=5) == {1 + 2 + 3}


def test_a_read_brings_numbers_home_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (
        torch.tensor([2**52 + 1, -3]),
        torch.tensor([[0.1, float("nan")], [float("inf"), -0.0]], dtype=torch.float64),
        torch.tensor([True, False]),
        torch.tensor([[1.5], [0.1]]),
        torch.empty(3, 0),
        torch.empty(0, dtype=torch.int64),
    )
    plain = transfer.read(*parts)
    monkeypatch.setattr(transfer, "on_host", lambda x: False)
    packed = transfer.read(*parts)
    assert repr(packed) == repr(plain)
