"""Parts of a wrong shape are refused when the engine is built, with the call that was wanted; every part of ours passes."""

from __future__ import annotations

import pytest

from outrider.control.fixed import Fixed
from outrider.drafters.none import NoDraft
from outrider.engine.contracts import check_parts
from outrider.errors import CapabilityError
from outrider.verify import LOSSLESS, SpeculativeSampling, load_rule
from tests.contract.asked import target

MODEL = target()


class ThreeArguments(SpeculativeSampling):
    def __call__(self, p, draft, noise):
        return super().__call__(p, draft, noise)


class AnyArguments(SpeculativeSampling):
    def __call__(self, *given, **named):
        return super().__call__(*given, **named)


class WithoutRelease:
    name, layers, trees, max_nodes, max_depth = "mine", (), False, 4, 4

    def bind(self, slots, length):
        pass

    def draft(self, evidence, budget):
        pass


class OldDraft(WithoutRelease):
    def draft(self, evidence):
        pass

    def release(self, slots):
        pass


class NoLayers(WithoutRelease):
    layers = property(lambda self: (_ for _ in ()).throw(AttributeError("layers")))


class Deaf:
    def budget(self, sequences):
        return [1] * len(sequences)


def forgetful_target():
    class Model:
        vocab_size, max_length, trees, rewinds, device = 5, 8, True, True, "cpu"

        def new_kv(self, slots, length):
            return None

        def forward(self, rows, kv):
            return None

    return Model()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"rule": ThreeArguments()},
            r"ThreeArguments cannot be a rule: the engine calls it with \(p, draft, noise, allowance\)",
        ),
        ({"rule": lambda p, draft, noise, allowance: None}, "function cannot be a rule: it has no attribute 'name'"),
        ({"rule": SpeculativeSampling}, r"is a class .* as in SpeculativeSampling\(\)"),
        ({"rule": None}, "NoneType cannot be a rule"),
        ({"drafter": WithoutRelease()}, r"it has no release\(slots\)"),
        ({"drafter": OldDraft()}, r"calls it with draft\(evidence, budget\), and it takes \(evidence\)"),
        ({"drafter": NoLayers()}, "no attribute 'layers'"),
        ({"controller": Deaf()}, r"it has no observe\(record\)"),
        ({"target": object()}, r"no attribute 'vocab_size'; .*HFTarget\(model\)"),
        ({"target": forgetful_target()}, r"calls it with forward\(rows, kv, layers\)"),
    ],
)
def test_a_wrong_shape_is_said(wrong: dict, said: str) -> None:
    parts = {"target": MODEL, "drafter": NoDraft(), "rule": SpeculativeSampling(), "controller": Fixed(2)} | wrong
    with pytest.raises(CapabilityError, match=said):
        check_parts(**parts)


def test_every_rule_of_ours_passes() -> None:
    """Every drafter of ours: tests/contract/test_contract.py, where they are trained."""
    for rule in (AnyArguments(), *map(load_rule, LOSSLESS)):
        check_parts(MODEL, NoDraft(), rule, Fixed(0))
