"""Names and words of the release before: they still work, and warn with what they are called now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

import outrider.drafters
from outrider.drafters.none import NoDraft
from outrider.drafters.tree.growth import SAMPLES, Levels
from outrider.drafters.tree.shapes import levels
from outrider.models.toy import TableTarget
from outrider.verify import LOSSLESS, SpeculativeSampling, load_rule
from tests.contract.asked import engine as small_engine
from tests.drafters.drafting import evidence, view


def test_fields_of_the_evidence() -> None:
    seen = evidence([view([1, 2])], 8)
    for old, new in (("law", "pipeline"), ("judged", "verdict_index"), ("source", "segment_index")):
        with pytest.warns(DeprecationWarning, match=rf"Evidence\.{old} is now Evidence\.{new};"):
            assert getattr(seen, old) is getattr(seen, new)


@pytest.mark.parametrize("name", [*sorted(LOSSLESS), "tv_budget:per_sequence=2"])
def test_limit_of_a_rule(name: str) -> None:
    rule = load_rule(name)
    with pytest.warns(DeprecationWarning, match=r"limit is now .*\.tv_limit;"):
        assert rule.limit == rule.tv_limit  # type: ignore[attr-defined]
    assert rule.tv_limit == (0.0 if rule.lossless else 2.0)


def test_a_rule_of_ones_own_that_has_a_limit() -> None:
    class Generous(SpeculativeSampling):
        name, lossless, limit = "generous", False, 0.5

    rule = Generous()
    with pytest.warns(DeprecationWarning, match="Generous.limit is now tv_limit;"):
        engine = small_engine(TableTarget.random(8, seed=1), NoDraft(), rule, 1)
    assert engine.parts.rule.tv_limit == 0.5


@dataclass(frozen=True)
class Frozen:
    """A rule of the release before that cannot be assigned to."""

    name: str = "frozen"
    lossless: bool = False
    trees: bool = False
    lane: str = "draft"
    limit: float = 0.5

    def __call__(self, p: Any, draft: Any, noise: Any, allowance: Any = None) -> Any:
        return SpeculativeSampling()(p, draft, noise, allowance)


def test_a_frozen_rule_that_has_a_limit() -> None:
    with pytest.warns(DeprecationWarning, match="Frozen.limit is now tv_limit;"):
        engine = small_engine(TableTarget.random(8, seed=1), NoDraft(), Frozen(), 1)
    assert engine.parts.rule.tv_limit == 0.5


def test_a_rule_that_knows_the_new_name_keeps_what_it_says() -> None:
    class Both(SpeculativeSampling):
        name, lossless, tv_limit, limit = "both", False, 0.25, 9

    rule = Both()
    assert small_engine(TableTarget.random(8, seed=1), NoDraft(), rule, 1).parts.rule.tv_limit == 0.25


def test_how_drafts_are_drawn() -> None:
    with pytest.warns(DeprecationWarning, match="sample 'law' is now 'sampled'"):
        assert Levels(levels((1, 1)), 8, sample="law").sample == "sampled" in SAMPLES  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Eagle", "EagleDrafter"),
        ("Medusa", "MedusaDrafter"),
        ("BlockDrafter", "DFlashDrafter"),
        ("Prediction", "PredictedOutput"),
    ],
)
def test_drafters(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"is now outrider.drafters.{new};"):
        assert getattr(outrider.drafters, old) is getattr(outrider.drafters, new)
    with pytest.raises(AttributeError, match="no attribute 'Nobody'"):
        outrider.drafters.Nobody  # noqa: B018


def test_incidents_of_an_engine() -> None:
    engine = small_engine(TableTarget.random(8, seed=1), NoDraft(), SpeculativeSampling(), 1)
    with pytest.warns(DeprecationWarning, match="defects;"):
        assert engine.incidents == engine.defects == 0
