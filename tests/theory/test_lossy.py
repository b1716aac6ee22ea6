"""Named lossy rules: the family's identities for all of them, each one's own acceptance, and where it is exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from outrider.theory import lossy, pareto
from outrider.theory.batch import total_variation
from tests.theory.instances import Array, Z, pairs, spiky

PARAMETERS: dict[str, dict] = {
    "epsilon": {"eps": 0.1},
    "lenience": {"factor": 0.7},
    "mentored": {"budget": 0.05},
    "cactus": {"delta": 0.05},
    "fuzzy": {"threshold": 0.2},
    "typical": {},
    "top_k": {"k": 2},
    "uno_target": {"eps": 0.05},
    "uno_draft": {"eps": 0.05},
}
STRICT = {
    "epsilon": {"eps": 0.0},
    "lenience": {"factor": 1.0},
    "mentored": {"budget": 0.0},
    "cactus": {"delta": 0.0},
    "fuzzy": {"threshold": 0.0},
}
GATES = ("typical", "top_k")


def test_every_rule_has_parameters_here():
    assert set(PARAMETERS) == set(lossy.RULES)


@pytest.mark.parametrize("name", PARAMETERS)
@settings(max_examples=40)
@given(pair=pairs())
def test_identities_of_the_family(name, pair):
    p, q = pair
    s = lossy.RULES[name](p, q, **PARAMETERS[name])
    tv = float(total_variation(p, q))
    assert ((s.accept >= 0) & (s.accept <= 1)).all()
    assert s.reject + s.optimal_bias == pytest.approx(tv + s.excess, abs=1e-12)
    assert s.kernel == pytest.approx(s.accept * q + s.reject * s.residual, abs=1e-15)
    assert s.kernel.sum() == pytest.approx(1.0, abs=1e-12)
    assert s.bias == pytest.approx(0.5 * np.abs(s.kernel - p).sum(), abs=1e-15)
    assert s.bias >= s.optimal_bias - 1e-12
    if not name.startswith("uno"):
        assert s.bias == pytest.approx(s.optimal_bias, abs=1e-12)
    if name not in GATES:
        assert s.excess == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", STRICT)
@settings(max_examples=40)
@given(pair=pairs())
def test_exact_at_the_strict_parameter(name, pair):
    p, q = pair
    s = lossy.RULES[name](p, q, **STRICT[name])
    assert s.kernel == pytest.approx(p, abs=1e-9)
    assert s.reject == pytest.approx(float(total_variation(p, q)), abs=1e-9)


@pytest.mark.parametrize("name", PARAMETERS)
def test_rows_are_independent(name):
    chain = spiky(6, 3, seed=5, zeros=0.2)
    whole = lossy.RULES[name](chain.target, chain.draft, **PARAMETERS[name])
    assert whole.kernel.shape == (3, 6, 6) and whole.bias.shape == (3, 6)
    one = lossy.RULES[name](chain.target[1, 4], chain.draft[1, 4], **PARAMETERS[name])
    assert whole.kernel[1, 4] == pytest.approx(one.kernel, abs=1e-12)
    assert whole.bias[1, 4] == pytest.approx(float(one.bias), abs=1e-12)


@pytest.mark.parametrize("name", PARAMETERS)
def test_kernel_is_what_the_coins_give(name):
    """Draw, toss, resample: chi-square-like z-tests of every token's frequency against the exact kernel."""
    rng = np.random.default_rng(11)
    p, q = rng.dirichlet(np.full(5, 0.7), size=2)
    s = lossy.RULES[name](p, q, **PARAMETERS[name])
    n = 40_000
    drawn = rng.choice(5, size=n, p=q)
    kept = rng.random(n) < s.accept[drawn]
    out = np.where(kept, drawn, rng.choice(5, size=n, p=s.residual / s.residual.sum()))
    seen = np.bincount(out, minlength=5) / n
    error = np.sqrt(s.kernel * (1 - s.kernel) / n)
    assert (np.abs(seen - s.kernel) <= Z * error + 1e-15).all()
    assert abs((~kept).mean() - s.reject) <= Z * np.sqrt(s.reject * (1 - s.reject) / n) + 1e-15
    if s.bias > 0.05:  # negative control: the target's law is told apart from the rule's
        assert (np.abs(seen - p) > Z * error).any()


@given(pairs())
def test_lenience_caps_every_token(pair):
    p, q = pair
    for factor in (0.3, 0.7, 1.0):
        assert (lossy.lenience(p, q, factor).kernel <= p / factor + 1e-12).all()


@given(pairs())
def test_suboptimal_residuals_have_the_stated_bias(pair):
    p, q = pair
    for eps in (0.0, 0.1):
        best, s = lossy.epsilon(p, q, eps), lossy.uno_target(p, q, eps)
        assert s.bias == pytest.approx(0.5 * np.abs(p * (1 - s.reject) - s.accept * q).sum(), abs=1e-12)
        for other in (s, lossy.uno_draft(p, q, eps)):
            assert other.bias >= best.bias - 1e-12
            assert other.reject == pytest.approx(float(best.reject), abs=1e-12)


def test_order_of_residuals_on_average():
    """The draft as residual is worse than the target, and both are worse than the optimal one."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(7), size=(2, 500))
    best, target, draft = (f(p, q, 0.05).bias.mean() for f in (lossy.epsilon, lossy.uno_target, lossy.uno_draft))
    assert best + 0.02 < target < draft - 0.02
    assert (lossy.uno_target(p, q, 0.0).bias > 1e-3).mean() > 0.9  # biased even where the rule is strict


def test_gates_are_off_the_front_and_ignore_the_draft():
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.full(6, 0.6), size=(2, 300))
    typical, top = lossy.typical(p, q), lossy.top_k(p, q, 1)
    assert typical.excess.max() > 0.05 and top.excess.max() > 0.3
    assert np.array_equal(typical.accept, lossy.typical(p, p).accept)
    assert (top.accept.sum(axis=1) == 1).all() and (top.accept.argmax(axis=1) == p.argmax(axis=1)).all()
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1)
    floor = np.minimum(0.09, 0.3 * np.exp(-entropy))
    assert np.array_equal(typical.accept, (p > floor[:, None]).astype(float))
    assert np.array_equal(lossy.top_k(p, q, 6).accept, np.ones_like(p))


def divergences(p: Array, q: Array) -> dict[str, float]:
    m = (p + q) / 2
    return {
        "tv": float(0.5 * np.abs(p - q).sum()),
        "kl": float((q * np.log(q / p)).sum()),
        "js": float(0.5 * (p * np.log(p / m)).sum() + 0.5 * (q * np.log(q / m)).sum()),
    }


@pytest.mark.parametrize("name", ["tv", "kl", "js"])
def test_fuzzy_switches_at_its_divergence(name):
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    d = divergences(p, q)[name]
    assert lossy.fuzzy(p, q, d * 1.001, name).reject == 0.0
    assert lossy.fuzzy(p, q, d * 0.999, name).kernel == pytest.approx(p)


def test_cactus_and_epsilon_acceptance_by_hand():
    p, q = np.array([0.2, 0.8]), np.array([0.8, 0.2])
    raised = 0.2 + np.sqrt(2 * 0.05 * 0.16)
    assert lossy.cactus(p, q, 0.05).accept == pytest.approx([raised / 0.8, 1.0])
    assert lossy.epsilon(p, q, 0.1).accept == pytest.approx([0.3 / 0.8, 1.0])
    assert lossy.lenience(p, q, 0.5).accept == pytest.approx([0.5, 1.0])


def test_any_rule_can_be_described():
    p, q = np.array([0.2, 0.8]), np.array([0.8, 0.2])
    s = lossy.step(p, q, 0.5, residual=[0.0, 1.0])
    assert s.kernel == pytest.approx([0.4, 0.6])
    assert s.excess == pytest.approx(float(pareto.excess(p, q, 0.5)))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: lossy.lenience([0.5, 0.5], [0.5, 0.5], 0.0), "factor"),
        (lambda: lossy.lenience([0.5, 0.5], [0.5, 0.5], 1.5), "factor"),
        (lambda: lossy.cactus([0.5, 0.5], [0.5, 0.5], -1.0), "delta"),
        (lambda: lossy.fuzzy([0.5, 0.5], [0.5, 0.5], 0.1, "h"), "divergence"),  # pyright: ignore[reportArgumentType]
        (lambda: lossy.top_k([0.5, 0.5], [0.5, 0.5], 0), "k"),
        (lambda: lossy.typical([0.5, 0.6], [0.5, 0.5]), "target"),
        (lambda: lossy.step([0.5, 0.5], [0.5, 0.5], 2.0), "accept"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
