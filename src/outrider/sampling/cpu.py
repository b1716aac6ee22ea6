"""Fast twins, for the CPU, of the cuts in `processors`: the same supports, the same distributions up to rounding.

On one core torch's argmax, sort and masked writes are 5 to 30 times slower than numpy's vectorised ones. A cut distribution has few
tokens: rows cut by top-k or min-p are collected into a small rectangle of candidates, processed there in float64 and scattered into
zeros; only rows cut by top-p alone need the whole row's softmax. The method depends on a row's own parameters alone, and rows are
never mixed, so a row's distribution has the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from outrider.nn import picks
from outrider.params import SamplingParams
from outrider.sampling.processors import NEVER, log_min_p, temper

Array = NDArray[np.floating]

_BLOCK = 64  # entries of a block, of which only the maximum is used first
_FLOORS = (1e-4, 1e-5, 1e-6, 0.0)  # a nucleus usually ends far above the last: then the tail need not be sorted
_CACHED = 1 << 18  # entries of a block of rows that is processed at once: 1 MiB of float32 stays in the cache


def peaks(x: Float[Tensor, "n V"]) -> list[float]:
    """The largest entry of each row; NaN, which wins every maximum, if there is one in it."""
    known = picks.peaks(x)
    return x.amax(-1).tolist() if known is None else known


def without_filters(x: Float[Tensor, "n V"], temperature: Sequence[float]) -> Float[Tensor, "n V"]:
    """Distributions of rows from which no token is cut, by temperature alone; at 0 the point mass at the most likely token."""
    known = picks.distributions(x, temperature)
    if known is not None:
        return known
    warm = [i for i, t in enumerate(temperature) if t > 0.0]
    if len(warm) < len(temperature):
        out = torch.zeros_like(x).scatter_(1, argmax(x), 1.0)
        if warm:
            out[warm] = without_filters(x[warm], [temperature[i] for i in warm])
        return out
    return (temper(x, temperature) if any(t != 1.0 for t in temperature) else x).softmax(-1)


def argmax(x: Float[Tensor, "n V"]) -> Int[Tensor, "n 1"]:
    """The most likely token of each row, the lowest number on ties."""
    return torch.from_numpy(x.numpy().argmax(-1)).unsqueeze(1)


def distribution_of(x: Float[Tensor, "n V"], params: Sequence[SamplingParams]) -> Float[Tensor, "n V"]:
    """Distributions of rows whose edits are done and whose temperature is above 0."""
    block = max(1, _CACHED // x.shape[1])
    if len(params) <= block:
        return _block(x, params)
    out = torch.empty_like(x)
    for low in range(0, len(params), block):
        out[low : low + block] = _block(x[low : low + block], params[low : low + block])
    return out


def _block(x: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    plain = [i for i, p in enumerate(params) if not p.filters]
    if not plain:
        return _filtered(x, params)
    probs = without_filters(x if len(plain) == len(params) else x[plain], [params[i].temperature for i in plain])
    if len(plain) == len(params):
        return probs
    cut, out = [i for i, p in enumerate(params) if p.filters], torch.empty_like(x)
    out[plain], out[cut] = probs, _filtered(x[cut], [params[i] for i in cut])
    return out


def _filtered(x: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Distributions of rows that are all cut."""
    x = temper(x, [p.temperature for p in params])
    few = [i for i, p in enumerate(params) if p.top_k > 0 or p.min_p > 0.0]
    if len(few) == len(params):
        return _few(x, params)
    probs = x.softmax(-1)
    if any(p.top_p < 1.0 for p in params):
        _restrict(probs.numpy(), [1.0 if p.top_k > 0 or p.min_p > 0.0 else p.top_p for p in params])
    if few:
        probs[few] = _few(x[few], [params[i] for i in few])
    return probs


# ---------------------------------------------------------------- top-k and min-p: few candidates


def _few(x: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Distributions of tempered rows that are all cut by top-k or min-p (or both), and perhaps by top-p."""
    values, vocab = x.numpy(), x.shape[1]
    top_k = [p.top_k if p.top_k < vocab else 0 for p in params]
    floor = np.array(log_min_p([p.min_p for p in params]), dtype=values.dtype)[:, None]
    for k in set(top_k) - {0}:
        rows = [i for i, other in enumerate(top_k) if other == k]
        chosen = values if len(rows) == len(values) else values[rows]
        floor[rows] = np.maximum(floor[rows], _bound(chosen, k))
    flat, real, values = _candidates(values, np.maximum(floor, np.finfo(values.dtype).min))
    order = np.argsort(-values, axis=-1, kind="stable")  # equal values stay in the order of their tokens
    flat, values = np.take_along_axis(flat, order, axis=-1), np.take_along_axis(values, order, axis=-1)
    for i, k in enumerate(top_k):
        if 0 < k < values.shape[1]:
            values[i, values[i] < values[i, k - 1]] = NEVER
    weights = np.exp(values, dtype=np.float64)
    if any(p.top_p < 1.0 for p in params):
        mass = np.array([p.top_p if p.top_p < 1.0 else 2.0 for p in params])[:, None]
        running = weights.cumsum(axis=-1)
        weights[:, 1:][running[:, :-1] >= mass * running[:, -1:]] = 0.0
    # A running sum: zero padding, whose amount depends on the batch, does not change it.
    probs = weights / np.maximum(weights.cumsum(axis=-1)[:, -1:], 1.0)
    out = torch.zeros(x.shape, dtype=x.dtype)  # row-major for any memory layout of x, so that `ravel` is a view
    out.numpy().ravel()[flat[real]] = probs[real]
    return out


def _bound(values: Array, k: int) -> Array:
    """A number [n, 1] that at least k entries of each row reach, 0 < k < V: the k-th largest or a little less.

    k of the maxima of disjoint blocks are at least the k-th largest maximum, so at least k entries of the row are.
    """
    n, vocab = values.shape
    blocks = vocab // _BLOCK
    if 4 * k > blocks:
        return np.partition(values, vocab - k, axis=-1)[:, vocab - k, None]
    peaks = values[:, : blocks * _BLOCK].reshape(n, _BLOCK, blocks).max(axis=1)
    return np.partition(peaks, blocks - k, axis=-1)[:, blocks - k, None]


def _candidates(values: Array, floor: Array) -> tuple[NDArray[np.int64], NDArray[np.bool_], Array]:
    """The entries >= their row's floor [n, 1], in the order of their tokens, each row padded with -inf.

    Returns places in the flat array [n, C], which of them are real (always the first of a row), and values [n, C].
    """
    mask = values >= floor
    counts = np.count_nonzero(mask, axis=1)
    real = np.arange(max(1, int(counts.max()))) < counts[:, None]
    places = np.flatnonzero(mask)
    flat = np.zeros(real.shape, dtype=np.int64)
    out = np.full(real.shape, NEVER, dtype=values.dtype)
    flat[real] = places
    out[real] = values.ravel()[places]
    return flat, real, out


# ---------------------------------------------------------------- top-p alone: few sorted


def _restrict(probs: Array, top_p: Sequence[float]) -> None:
    """Restrict each row to its nucleus, in place: see `processors.nucleus`."""
    least = np.zeros((len(probs), 1), dtype=probs.dtype)
    kept = np.ones((len(probs), 1), dtype=probs.dtype)
    rows = [i for i, mass in enumerate(top_p) if mass < 1.0]
    for floor in _FLOORS:
        if rows:
            rows = _find_borders(probs, rows, top_p, floor, least, kept)
    np.multiply(probs, probs >= least, out=probs)
    np.divide(probs, kept, out=probs)


def _find_borders(
    probs: Array, rows: list[int], top_p: Sequence[float], floor: float, least: Array, kept: Array
) -> list[int]:
    """Fill in the least kept probability and the kept mass of those `rows` whose nucleus is above `floor`.

    Returns the other rows. Entries above any floor are the beginning of the full order, so their running sums are the full
    order's: the floor at which a nucleus is found makes no difference.
    """
    chosen = probs if len(rows) == len(probs) else probs[rows]
    _, _, ordered = _candidates(chosen, np.array([[floor]], dtype=probs.dtype))
    ordered[ordered == NEVER] = 0.0
    ordered.sort(axis=-1)
    ordered = ordered[:, ::-1]
    running = np.cumsum(ordered, axis=-1, dtype=np.float64)
    last = np.count_nonzero(running < np.array([top_p[i] for i in rows])[:, None], axis=1)
    missing = []
    for j, i in enumerate(rows):
        n = int(last[j])
        if n == ordered.shape[1]:
            missing.append(i)
            continue
        border = ordered[j, n]
        least[i], kept[i] = border, running[j, n]
        if n + 1 < ordered.shape[1] and ordered[j, n + 1] == border:
            spare = n + 1 - int(np.count_nonzero(ordered[j] > border))
            probs[i, np.flatnonzero(probs[i] == border)[spare:]] = 0.0
    return missing
