"""Tokens of a step of a draft model with a part of its vocabulary: what is predicted is what the engine makes.

Apart from test_restricted.py, whose calls are checked for shapes and types in `make test`: this makes the same calls thousands of
times, and is checked in `make test-slow`.
"""

from __future__ import annotations

import pytest
import torch

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.model import ModelDrafter
from outrider.models import token_use
from outrider.models.restricted import Restricted
from outrider.models.toy import TableTarget
from outrider.models.vocabulary_choice import curve
from outrider.params import SamplingParams
from outrider.theory import speedup
from outrider.verify import load_rule


def test_tokens_of_a_step_are_the_engines_where_the_text_stays_outside_of_the_kept_tokens() -> None:
    """Two halves of the vocabulary that the text seldom changes between, of which the draft has one: 4 tokens a step there, 1 here.

    The mean acceptance (about a half, so 1.9 tokens a step if every position were alike) says nothing of it.
    """
    far = torch.full((20, 20), 0.004)
    far[:10, :10] = far[10:, 10:] = 0.096
    target, kept = TableTarget(far.log()), torch.arange(10)
    order = torch.cat([kept, torch.arange(10, 20)])
    texts = token_use.count(target, [[n % 20] for n in range(400)], tokens=60).unseen
    (found,) = curve(target, target, token_use.TokenUse(order, texts, 1), [10], 3)
    alike = speedup.tokens_per_call(found.acceptance, 3)
    drafter = ModelDrafter(Restricted(target, kept), 3)
    engine = Engine(target, drafter, load_rule("block"), Fixed(3), slots=16, max_length=64)
    params = [SamplingParams(temperature=1.0, max_tokens=60, seed=n) for n in range(200)]
    engine.generate([[n % 20] for n in range(200)], params)
    made = engine.counts.tokens / engine.counts.steps
    assert found.sampled == pytest.approx(made, rel=0.04) and alike > 1.1 * made
