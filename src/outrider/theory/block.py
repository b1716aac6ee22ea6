"""Block verification: a whole drafted block judged at once, exactly, with more tokens accepted than token by token.

X_1..X_g is drafted from q. With P_0 = 1 and P_i = min(P_{i-1} p(X_i | .) / q(X_i | .), 1), p the target, let

    S_i = sum_x (P_i p(x | X^i) - q(x | X^i))_+,    h_i = S_i / (S_i + 1 - P_i)  (i < g; 1 if 0/0),    h_g = P_g.

tau is the largest i whose coin of bias h_i falls (0 if none does); X^tau is kept and one token more is drawn from
(P_tau p - q)_+, normalised, or from p if tau = g. Un-normalised, with w_i(x^i) = q(x^i) P_i, that is w_0 = 1 and
w_i = min(w_{i-1} p(x_i | .), q(x^i)), everything has a closed form:

    P(tau >= i | X^i) = P_i,      P(tau = i, X^i = x^i, Y = y) = (w_i(x^i) p(y | x^i) - q(x^i y))_+      (i < g)
                                                              = w_g(x^g) p(y | x^g)                      (i = g)

and since w_i p = w_{i+1} + (w_i p - q)_+ the output has law p, by induction. Source: Sun et al., "Block verification
accelerates speculative decoding", ICLR 2025 (arXiv 2403.10444).

Laws of a block are given for every prefix: `target[i]` and `draft[i]` have shape (V,) * (i + 1), the last axis is the
(i + 1)-th token and the axes before it are the tokens it is conditioned on. Work and memory are V^(g+1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from outrider.theory.chains import Chain
from outrider.theory.checks import positive_int, probabilities, real
from outrider.theory.laws import Array, Estimate, normalised, ratio


@dataclass(frozen=True, slots=True)
class Lengths:
    """Expected number of accepted draft tokens, without the one that is always added; token <= block <= upper.

    Attributes:
        token: token-by-token speculative sampling, sum_i sum_x prod_j min(p, q).
        block: block verification, sum_i sum_x w_i(x^i).
        upper: sum_i sum_x min(p(x^i), q(x^i)): no exact rule that treats rounds independently has more.
    """

    token: float
    block: float
    upper: float


@dataclass(frozen=True, slots=True)
class LengthEstimates:
    """Monte Carlo estimates of the three `Lengths`, from the same paths."""

    token: Estimate
    block: Estimate
    upper: Estimate


@dataclass(frozen=True, slots=True, eq=False)
class Judgement:
    """What block verification does with given drafted blocks, leading axes (...).

    Attributes:
        reach: (..., g), P_1..P_g, the probability that tau >= i.
        coin: (..., g), h_1..h_g. All are tossed; the last one that falls counts.
        length: (..., g + 1), the law of tau.
        residual: (..., g + 1, V), the law of the added token, for each value of tau.
    """

    reach: Array
    coin: Array
    length: Array
    residual: Array


def conditionals(chain: Chain, first: int, state: int, length: int) -> tuple[list[Array], list[Array]]:
    """(target, draft) laws of a block of `length` tokens after x_first = `state`; the target has one law more.

    At the horizon both have `length` of them.

    >>> from outrider.theory.chains import best_guess
    >>> target, draft = conditionals(best_guess(states=3, horizon=4), first=0, state=1, length=2)
    >>> [law.shape for law in target], len(draft)
    ([(3,), (3, 3), (3, 3, 3)], 2)
    """
    if positive_int("first", first, 0) + positive_int("length", length) > chain.horizon:
        raise ValueError(f"length must be at most {chain.horizon - first} after position {first}, got {length}")
    if not 0 <= state < chain.states:
        raise ValueError(f"state must be in [0, {chain.states}), got {state}")

    def law(kernels: Array, i: int) -> Array:
        if i == 0:
            return kernels[first, state]
        return np.broadcast_to(kernels[first + i], (chain.states,) * (i + 1))

    more = min(length + 1, chain.horizon - first)
    return [law(chain.target, i) for i in range(more)], [law(chain.draft, i) for i in range(length)]


def weights(target: Sequence[npt.ArrayLike], draft: Sequence[npt.ArrayLike]) -> list[Array]:
    """w_0, ..., w_g: `weights[i][x]` is P(X^i = x, tau >= i), shape (V,) * i.

    >>> weights([[0.5, 0.5]], [[0.75, 0.25]])[1]
    array([0.5 , 0.25])
    """
    return _weights(*_block(target, draft))


def joint_law(target: Sequence[npt.ArrayLike], draft: Sequence[npt.ArrayLike]) -> list[Array]:
    """P(tau = i, X^i, Y) for i = 0, ..., g: `joint[i]` has shape (V,) * (i + 1). Needs g + 1 target laws.

    >>> joint_law([[0.5, 0.5], [[0.5, 0.5], [0.5, 0.5]]], [[0.75, 0.25]])[0]
    array([0.  , 0.25])
    """
    p, q = _block(target, draft, bonus=True)
    return [*_stops(p, q), _weights(p, q)[-1][..., None] * p[len(q)]]


def string_law(target: Sequence[npt.ArrayLike], draft: Sequence[npt.ArrayLike]) -> Array:
    """Law of g + 1 tokens made by one round of block verification and completed by the target: (V,) * (g + 1).

    Equal to the target's law, which is what exactness means.

    >>> string_law([[0.5, 0.5], [[1.0, 0.0], [0.0, 1.0]]], [[0.75, 0.25]])
    array([[0.5, 0. ],
           [0. , 0.5]])
    """
    p, _ = _block(target, draft, bonus=True)
    joint = joint_law(target, draft)
    law = joint[0]
    for i in range(1, len(joint)):
        law = law[..., None] * p[i] + joint[i]
    return law


def expected_lengths(target: Sequence[npt.ArrayLike], draft: Sequence[npt.ArrayLike]) -> Lengths:
    """The three expected accepted lengths, by enumeration of the V^g drafts.

    >>> expected_lengths([[0.5, 0.5]], [[0.75, 0.25]])
    Lengths(token=0.75, block=0.75, upper=0.75)
    """
    p, q = _block(target, draft)
    block = sum(float(w.sum()) for w in _weights(p, q)[1:])
    token = upper = 0.0
    shared = p_path = q_path = np.ones(())
    for a, b in zip(p, q, strict=False):
        shared = shared[..., None] * np.minimum(a, b)
        p_path, q_path = p_path[..., None] * a, q_path[..., None] * b
        token += float(shared.sum())
        upper += float(np.minimum(p_path, q_path).sum())
    return Lengths(token, block, upper)


def estimate_lengths(
    target: npt.ArrayLike, draft: npt.ArrayLike, sampled_from: Literal["draft", "target"] = "draft"
) -> LengthEstimates:
    """Unbiased estimates from the probabilities of the tokens along sampled paths, for models of any size.

    Args:
        target, draft: (n, g), what each model gave to each token of n >= 2 paths, in (0, 1] for the sampling model.
        sampled_from: which model the paths come from. From the draft, tau's conditional mean sum_i P_i is averaged.
            From the target, w_i(x^i) / p(x^i) = min over j <= i of q(x^j) / p(x^j) is: ordinary text generated by the
            target is enough, and every term is in [0, 1].

    >>> estimates = estimate_lengths([[0.5], [0.5], [0.5], [0.5]], [[0.75], [0.75], [0.75], [0.25]])
    >>> round(estimates.block.value, 12)
    0.75
    """
    p, q = real("target", target, ndim=2), real("draft", draft, ndim=2)
    if p.shape != q.shape or p.shape[1] == 0:
        raise ValueError(f"target and draft must have the same shape (n, g) with g >= 1, got {p.shape} and {q.shape}")
    if sampled_from not in ("draft", "target"):
        raise ValueError(f"sampled_from must be 'draft' or 'target', got {sampled_from!r}")
    for name, a in (("target", p), ("draft", q)):
        wrong = (a < 0) | (a > 1) | ((a == 0) & (name == sampled_from))
        if wrong.any():
            raise ValueError(f"{name} must hold probabilities of tokens, got {a[wrong].flat[0]:g}")
    quotient = p / q if sampled_from == "draft" else q / p
    token = np.cumprod(np.minimum(quotient, 1.0), axis=1)
    with np.errstate(divide="ignore"):  # a token that the other model rules out
        path = np.exp(np.minimum(np.cumsum(np.log(quotient), axis=1), 0.0))
    block = _reach(quotient) if sampled_from == "draft" else np.minimum.accumulate(path, axis=1)
    return LengthEstimates(*(Estimate.of(a.sum(axis=1)) for a in (token, block, path)))


def estimate_from_rows(
    target: npt.ArrayLike, draft: npt.ArrayLike, samples: int, rng: np.random.Generator
) -> LengthEstimates:
    """Estimates for one block whose laws, (g, V), do not depend on the tokens drafted before.

    Blocks are drawn from the rows of `draft`. For stored rows along one text this treats the later rows as if they
    were the same after every draft: an approximation of the model, not of the rule.

    >>> rng = np.random.default_rng(0)
    >>> estimate_from_rows([[0.5, 0.5]] * 3, [[0.5, 0.5]] * 3, samples=10, rng=rng).block
    Estimate(value=3.0, standard_error=0.0)
    """
    p, q = probabilities("target", target, ndim=2), probabilities("draft", draft, ndim=2)
    if p.shape != q.shape:
        raise ValueError(f"target and draft must have the same shape, got {p.shape} and {q.shape}")
    cumulated, count = np.cumsum(q, axis=1), positive_int("samples", samples, low=2)
    u = rng.random((count, len(q)))
    tokens = [np.searchsorted(c, u[:, i] * c[-1], side="right") for i, c in enumerate(cumulated)]
    given = [np.stack([a[i, t] for i, t in enumerate(tokens)], axis=1) for a in (p, q)]
    return estimate_lengths(given[0], given[1])


def judge(target: npt.ArrayLike, draft: npt.ArrayLike, tokens: npt.ArrayLike) -> Judgement:
    """Block verification of drafted blocks, step by step, with the coins left as probabilities: for any vocabulary.

    Args:
        target: (..., g + 1, V), the target's law at each position along the drafted block and after it.
        draft: (..., g, V), the draft's.
        tokens: (..., g), integers, the drafted tokens.

    >>> judge([[0.5, 0.5], [1.0, 0.0]], [[0.75, 0.25]], [0]).length.round(12)
    array([0.33333333, 0.66666667])
    """
    p, q, x = probabilities("target", target), probabilities("draft", draft), np.asarray(tokens)
    if p.ndim < 2 or q.shape[-2] + 1 != p.shape[-2] or q.shape[:-2] + q.shape[-1:] != p.shape[:-2] + p.shape[-1:]:
        raise ValueError(f"target must have one row more than draft, (..., g + 1, V), got {p.shape} and {q.shape}")
    if x.dtype.kind not in "iu" or x.shape != q.shape[:-1] or (x < 0).any() or (x >= q.shape[-1]).any():
        raise ValueError(f"tokens must be integers in [0, {q.shape[-1]}) of shape {q.shape[:-1]}, got {x!r}")
    at = x[..., None]
    px, qx = np.take_along_axis(p[..., :-1, :], at, -1)[..., 0], np.take_along_axis(q, at, -1)[..., 0]
    if (qx == 0).any():
        raise ValueError("tokens must have positive probability under draft, got one with 0")
    reach = _reach(px / qx)
    before = np.concatenate([np.ones((*reach.shape[:-1], 1)), reach], axis=-1)
    rest = np.maximum(before[..., :-1, None] * p[..., :-1, :] - q, 0.0)
    mass = rest.sum(axis=-1)[..., 1:]
    inner = ratio(mass, mass + 1.0 - reach[..., :-1], 1.0)
    coin = np.concatenate([inner, reach[..., -1:]], axis=-1)
    # tau = i: coin i falls (for i = 0 there is none) and no later one does.
    falls, misses = np.ones(before.shape), np.ones(before.shape)
    falls[..., 1:], misses[..., :-1] = coin, np.cumprod((1.0 - coin)[..., ::-1], axis=-1)[..., ::-1]
    residual = np.concatenate([normalised(rest, p[..., :-1, :]), p[..., -1:, :]], axis=-2)
    return Judgement(reach, coin, falls * misses, residual)


def expected_rejections(chain: Chain) -> float:
    """E[N_rej] when blocks reach to the horizon (no added token after a fully accepted block). V^T work.

    May be less than sum_n E[TV(p_n, q_n)], the least of any rule that judges one token at a time (Yin et al., NeurIPS
    2024, Theorem 2): block verification is outside the family of that theorem.

    >>> from outrider.theory.chains import iid
    >>> round(expected_rejections(iid(draft=[0.75, 0.25], target=[0.5, 0.5], horizon=2)), 12)
    0.4375
    """
    cost = np.zeros((chain.horizon + 1, chain.states))  # expected rejections after x_n, with a fresh block
    for n in range(chain.horizon - 1, -1, -1):
        for x in range(chain.states):
            stops = _stops(*conditionals(chain, n, x, chain.horizon - n))
            cost[n, x] = sum(float((s * (1.0 + cost[n + i + 1])).sum()) for i, s in enumerate(stops))
    return float(chain.start @ cost[0])


def _weights(p: list[Array], q: list[Array]) -> list[Array]:
    out = [np.ones(())]
    path = np.ones(())
    for a, b in zip(p, q, strict=False):
        path = path[..., None] * b
        out.append(np.minimum(out[-1][..., None] * a, path))
    return out


def _stops(p: list[Array], q: list[Array]) -> list[Array]:
    """The joint laws of tau = i < g."""
    out, path = [], np.ones(())
    for a, b, w in zip(p, q, _weights(p, q), strict=False):
        path = path[..., None] * b
        out.append(np.maximum(w[..., None] * a - path, 0.0))
    return out


def _reach(quotient: Array) -> Array:
    """P_1, ..., P_g from p/q of the drafted tokens, along the last axis."""
    out = np.empty_like(quotient)
    last = np.ones(quotient.shape[:-1])
    for i in range(quotient.shape[-1]):
        last = out[..., i] = np.minimum(last * quotient[..., i], 1.0)
    return out


def _block(
    target: Sequence[npt.ArrayLike], draft: Sequence[npt.ArrayLike], bonus: bool = False
) -> tuple[list[Array], list[Array]]:
    length = len(draft)
    allowed = (length + 1,) if bonus else (length, length + 1)
    if length == 0 or len(target) not in allowed:
        raise ValueError(
            f"target must hold {' or '.join(map(str, allowed))} laws and draft at least 1, got {len(target)}"
        )
    p = [probabilities(f"target[{i}]", a, ndim=i + 1) for i, a in enumerate(target)]
    q = [probabilities(f"draft[{i}]", a, ndim=i + 1) for i, a in enumerate(draft)]
    for name, laws in (("target", p), ("draft", q)):
        for i, a in enumerate(laws):
            if a.shape != p[0].shape * (i + 1):
                raise ValueError(f"{name}[{i}] must have shape {p[0].shape * (i + 1)}, got {a.shape}")
    return p, q
