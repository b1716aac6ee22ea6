"""Logits processors: logits in, logits out, each row independent of the batch.

Order, as in vLLM's sampler (`vllm/v1/sample/sampler.py`): logit bias, minimum length, penalties, temperature, min-p,
top-k, top-p. The first three edit logits and may change the most likely token; the last three only cut tokens. (Hugging
Face's `_get_logits_processor` puts min-p after top-p; a ban is -inf, so its place among the edits is immaterial.)

Every cut is a *threshold on values*: top-k's is the k-th largest logit, top-p's the least likely token of the nucleus. So
the result does not depend on how a sort breaks ties, nor on the other rows of the call, bit for bit. The cuts here are
batched torch operators for any device; `cpu.py` has their fast twins for the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from outrider.params import SamplingParams
from outrider.sampling.history import History

NEVER = -math.inf


def column(values: Sequence[float], like: Tensor) -> Float[Tensor, "n 1"]:
    """One number per row, ready to broadcast over the vocabulary."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


# ---------------------------------------------------------------- edits (in place on the caller's own copy)


def _by_params(params: Sequence[SamplingParams], rows: Sequence[int]) -> list[tuple[SamplingParams, list[int]]]:
    """Rows grouped by parameter object: usually all rows of a request."""
    groups: dict[int, tuple[SamplingParams, list[int]]] = {}
    for i in rows:
        groups.setdefault(id(params[i]), (params[i], []))[1].append(i)
    return list(groups.values())


def _grid(rows: Sequence[int], ids: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    at = lambda x: torch.tensor(x, dtype=torch.int64, device=device)  # noqa: E731
    return at(list(rows)).unsqueeze(1), at(list(ids)).unsqueeze(0)


def add_bias(x: Float[Tensor, "M V"], params: Sequence[SamplingParams]) -> None:
    """Add each row's `logit_bias`."""
    for p, rows in _by_params(params, [i for i, p in enumerate(params) if p.logit_bias]):
        where = _grid(rows, [t for t, _ in p.bias], x.device)
        x[where] += torch.tensor([b for _, b in p.bias], dtype=x.dtype, device=x.device)


def forbid(
    x: Float[Tensor, "M V"], params: Sequence[SamplingParams], rows: Sequence[int], eos_ids: Sequence[int]
) -> None:
    """Forbid in `rows` every token that would end the request: its stop tokens, and the model's end unless `ignore_eos`.

    A ban that would leave a row without any possible token is not applied to that row: the model can only end there.
    """
    for p, group in _by_params(params, rows):
        ids = sorted({*p.stop_token_ids, *(() if p.ignore_eos else eos_ids)})
        if not ids:
            continue
        where = _grid(group, ids, x.device)
        before = x[where]
        x[where] = NEVER
        dead = (x.amax(-1) == NEVER)[where[0]]
        x[where] = torch.where(dead, before, NEVER)


def penalise(
    x: Float[Tensor, "M V"],
    params: Sequence[SamplingParams],
    rows: Sequence[int],
    histories: Sequence[History],
    paths: Sequence[Sequence[int]],
) -> None:
    """Repetition (Keskar et al. 2019, CTRL, section 4.1), then frequency and presence penalties (OpenAI), in `rows`.

    histories, paths: per entry of `rows` the sequence's history and the drafted tokens after it.
    """
    vocab = x.shape[1]
    flat: list[NDArray[np.int64]] = []
    counts: list[NDArray[np.float64]] = []
    for i, history, path in zip(rows, histories, paths, strict=True):
        ids, count = history.along(path)
        flat.append(ids + i * vocab)
        counts.append(count)
    sizes = [len(ids) for ids in flat]

    def each(values: Sequence[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values), sizes)).to(x)

    where = torch.from_numpy(np.concatenate(flat)).to(x.device)
    count = torch.from_numpy(np.concatenate(counts)).to(x)
    old = x.view(-1)[where]
    factor = each([params[i].repetition_penalty for i in rows])
    new = torch.where(old > 0, old / factor, old * factor)
    new -= each([params[i].frequency_penalty for i in rows]) * count
    new -= each([params[i].presence_penalty for i in rows]) * (count > 0)
    # A finite logit stays finite: an overflow must not turn a possible token into an impossible or a certain one.
    new.clamp_(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max)
    x.view(-1)[where] = torch.where(old == NEVER, old, new)


# ---------------------------------------------------------------- temperature and cuts


def temper(x: Float[Tensor, "n V"], temperature: Sequence[float]) -> Float[Tensor, "n V"]:
    """(logits - their maximum) / temperature, a new tensor with maximum 0: no overflow at any temperature."""
    return (x - x.amax(-1, keepdim=True)).div_(column(temperature, x))


def log_min_p(min_p: Sequence[float]) -> list[float]:
    """Least logit that min-p keeps, relative to the largest; -inf where it is off."""
    return [math.log(m) if m > 0.0 else NEVER for m in min_p]


def keep_min_p(x: Float[Tensor, "n V"], min_p: Sequence[float]) -> None:
    """Forbid tokens less than `min_p` times as likely as the most likely one. x has maximum 0 in each row."""
    x.masked_fill_(x < column(log_min_p(min_p), x), NEVER)


def keep_top_k(x: Float[Tensor, "n V"], top_k: Sequence[int]) -> None:
    """Forbid tokens below the k-th largest logit of their row; those equal to it stay. 0 = no cut."""
    active = [k if 0 < k < x.shape[1] else 0 for k in top_k]
    largest = x.topk(max(1, *active), dim=-1).values
    place = torch.tensor([max(k - 1, 0) for k in active], device=x.device).unsqueeze(1)
    kth = torch.where(place.new_tensor(active).unsqueeze(1) > 0, largest.gather(1, place), NEVER)
    x.masked_fill_(x < kth, NEVER)


def nucleus(probs: Float[Tensor, "n V"], top_p: Sequence[float]) -> Float[Tensor, "n V"]:
    """Distributions restricted to their nucleus (Holtzman et al. 2020): the fewest most likely tokens with mass >= top_p.

    Mass is the running float64 sum, largest first; of equally likely tokens at the border the lowest numbers stay. A row
    that does not reach top_p (1 = no cut, or rounding) is unchanged. Changes `probs`.
    """
    mass = torch.tensor(top_p, dtype=torch.float64, device=probs.device).unsqueeze(1)
    ordered = probs.sort(dim=-1, descending=True).values
    running = ordered.cumsum(-1, dtype=torch.float64)
    size = (running < mass).sum(-1, keepdim=True).add_(1).clamp_(max=probs.shape[1])
    border = ordered.gather(1, size - 1)
    spare = size - (ordered > border).sum(-1, keepdim=True)  # how many of the tokens at the border stay
    equal = probs == border
    cut = (probs < border) | (equal & (equal.cumsum(-1) > spare))
    reached = (mass < 1.0) & (running[:, -1:] >= mass)
    kept = torch.where(reached, running.gather(1, size - 1), 1.0).to(probs.dtype)
    return probs.masked_fill_(cut & reached, 0.0).div_(kept)


def distribution_of(x: Float[Tensor, "n V"], params: Sequence[SamplingParams]) -> Float[Tensor, "n V"]:
    """Distributions of rows whose edits are done and whose temperature is above 0. Any device; `cpu.distribution_of` is the fast
    twin."""
    if any(p.temperature != 1.0 or p.filters for p in params):
        x = temper(x, [p.temperature for p in params])
    if any(p.min_p > 0.0 for p in params):
        keep_min_p(x, [p.min_p for p in params])
    if any(p.top_k > 0 for p in params):
        keep_top_k(x, [p.top_k for p in params])
    probs = x.softmax(-1)
    return nucleus(probs, [p.top_p for p in params]) if any(p.top_p < 1.0 for p in params) else probs
