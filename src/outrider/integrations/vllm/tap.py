"""The ledger inside vLLM's worker: what its rejection sampler should have rejected beside what it did, and our rules in its place.

Both stand where vLLM calls `rejection_sample`: there the target's distributions are final (temperature, top-k, top-p, penalties)
and draft tokens and draft distributions are at hand. Shapes: n draft tokens of B requests, V vocabulary, K the longest draft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from outrider.noise import Noise
from outrider.protocols import Rule
from outrider.records import Counts
from outrider.types import Draft, Proposal, Verdict

SUMS = ("steps", "proposed", "judged", "accepted", "rejected", "risk", "spread", "bias")
"""Sums of a tap over sequence-steps with a draft, in this order; see `records.Counts`."""


class Tap:
    """Sums over all requests, and over those whose noise the engine chose; they stay on the device until `report`.

    longest: K, vLLM's `num_speculative_tokens`.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._sums: Tensor | None = None  # [2, SUMS]: of all requests, and of those without a seed of their own
        self._at: Tensor | None = None  # [2, K]: judged, and accepted, by depth
        self._ours = Counts(), Counts()  # of steps that one of our rules decided, likewise

    def reset(self) -> None:
        """Start again from zero, after the calls of vLLM's warm-up."""
        self._sums = self._at = None
        self._ours = Counts(), Counts()

    def report(self) -> dict[str, Any]:
        """The sums as plain numbers: `all` and `engine_seeded` by name, `judged_at` and `accepted_at` by depth."""
        zero = [[0.0] * len(SUMS)] * 2
        sums = zero if self._sums is None else self._sums.tolist()
        at = [[0] * self.longest] * 2 if self._at is None else self._at.long().tolist()
        rows: dict[str, Any] = {}
        for name, row, ours in zip(("all", "engine_seeded"), sums, self._ours, strict=True):
            rows[name] = {key: value + getattr(ours, key) for key, value in zip(SUMS, row, strict=True)}
        ours = self._ours[0]
        for name, mine, more in (("judged_at", at[0], ours.judged_at), ("accepted_at", at[1], ours.accepted_at)):
            rows[name] = [n + (more[d] if d < len(more) else 0) for d, n in enumerate(mine)]
        return rows

    def enter(self, drafted: Sequence[int], verdict: Verdict, seeded: Sequence[int]) -> None:
        """One step that one of our rules decided: its verdict has the sums. drafted: draft tokens of each request."""
        for b, count in enumerate(drafted):
            if not count:
                continue
            row = (count, verdict.accepted[b], verdict.judged[b], verdict.risk[b], verdict.spread[b], verdict.bias[b])
            for counts in self._ours[: 1 if b in seeded else 2]:
                counts.add(*row)

    def add(
        self,
        drafted: Sequence[int],
        token: Int[Tensor, "n"],
        risk: Float[Tensor, "n"],
        accepted: Int[Tensor, "B"],
        seeded: Sequence[int],
    ) -> None:
        """One step. drafted: draft tokens of each request. token: the drafts; from the first negative one on they are placeholders.
        risk: rejection probability of each before its coin. accepted: of each request. seeded: requests with a seed of their
        own."""
        if not len(risk):
            return
        device = risk.device
        count, owner = torch.tensor(drafted, device=device), _owner(drafted, device)
        first = count.cumsum(0) - count
        depth = torch.arange(len(risk), device=device) - first[owner]
        bad = (token.to(device) < 0).long().cumsum(0)
        real = bad == (bad - (token.to(device) < 0).long())[first[owner]]  # no placeholder so far in this request
        kept = accepted.to(device)[owner]
        judged = real & (depth <= kept)
        columns = [
            (depth == 0) & real,
            real,
            judged,
            judged & (depth < kept),
            judged & (depth == kept),
            risk * judged,
            risk * (1.0 - risk) * judged,
            torch.zeros_like(risk),
        ]
        values = torch.stack([c.double() for c in columns])
        own = torch.zeros(len(drafted), dtype=torch.bool)
        own[list(seeded)] = True
        sums = torch.stack([values.sum(1), (values * ~own.to(device)[owner]).sum(1)])
        at = torch.zeros(2, self.longest, dtype=torch.float64, device=device)
        at[0].index_add_(0, depth, values[2])
        at[1].index_add_(0, depth, values[3])
        self._sums = sums if self._sums is None else self._sums + sums
        self._at = at if self._at is None else self._at + at


def risks(
    logits: Float[Tensor, "n V"],
    token: Int[Tensor, "n"],
    q: Float[Tensor, "n V"] | None,
    greedy: Tensor | bool,
) -> Float[Tensor, "n"]:
    """Rejection probability of every draft token before its coin: 1 - sum min(p, q), or 1 - p(x) for a point mass.

    logits: of the target, after temperature and filters. greedy: per token or for all, whether p is the point mass at the argmax.
    """
    x = token.long().clamp(min=0)[:, None]
    certain = (logits.argmax(-1) != x[:, 0]).double() if greedy is not False else None
    if greedy is True and certain is not None:
        return certain
    if q is None:
        p_of_x = (logits.gather(1, x)[:, 0].double() - logits.double().logsumexp(-1)).exp()
        risk = 1.0 - p_of_x
    else:
        risk = 1.0 - torch.minimum(logits.softmax(-1, dtype=torch.float32), q).double().sum(-1)
    risk = risk.clamp(0.0, 1.0)
    return torch.where(greedy, certain, risk) if certain is not None and isinstance(greedy, Tensor) else risk


Names = Callable[[], Sequence[str]]
"""The requests of the batch, row by row."""


class Watched:
    """vLLM's `rejection_sample`, watched: same arguments, same result, and the tap gets its sums.

    In a step without drafts the result is the token that vLLM has drawn for each request; vLLM's own would draw what replaces a
    rejected token all the same.
    """

    def __init__(self, inner: Callable[..., Tensor], tap: Tap) -> None:
        self.inner, self.tap = inner, tap

    def __call__(
        self,
        draft_token_ids: Tensor,
        num_draft_tokens: list[int],
        max_spec_len: int,
        cu_num_draft_tokens: Tensor,
        draft_probs: Tensor | None,
        target_logits: Tensor,
        bonus_token_ids: Tensor,
        sampling_metadata: Any,
        **more: Any,
    ) -> Tensor:
        if not any(num_draft_tokens):
            return pad(bonus_token_ids.to(torch.int32), (0, max_spec_len), value=-1)
        owner = _owner(num_draft_tokens, target_logits.device)
        greedy = _greedy(sampling_metadata, owner)
        risk = risks(
            target_logits, draft_token_ids, draft_probs, greedy
        )  # before: the kernels may write into their inputs
        out = self.inner(
            draft_token_ids,
            num_draft_tokens,
            max_spec_len,
            cu_num_draft_tokens,
            draft_probs,
            target_logits,
            bonus_token_ids,
            sampling_metadata,
            **more,
        )
        accepted = (out != -1).sum(1) - 1
        self.tap.add(num_draft_tokens, draft_token_ids, risk, accepted, list(sampling_metadata.generators))
        return out


class Ruled:
    """One of our rules in the place of vLLM's `rejection_sample`; decided on the host.

    rule: for chains. names: the requests of the batch, for budgets of whole outputs.
    """

    def __init__(self, rule: Rule, tap: Tap, names: Names) -> None:
        self.rule, self.tap, self._names = rule, tap, names
        self._left: dict[str, float] = {}

    def __call__(
        self,
        draft_token_ids: Tensor,
        num_draft_tokens: list[int],
        max_spec_len: int,
        cu_num_draft_tokens: Tensor,
        draft_probs: Tensor | None,
        target_logits: Tensor,
        bonus_token_ids: Tensor,
        sampling_metadata: Any,
        **more: Any,
    ) -> Tensor:
        device = target_logits.device
        greedy = _greedy(sampling_metadata, _owner(num_draft_tokens, device))
        p, draft = laid_out(
            draft_token_ids, num_draft_tokens, draft_probs, _distributions(target_logits, greedy), bonus_token_ids
        )
        noise = Noise(tuple(_seeds(sampling_metadata.generators, len(num_draft_tokens))), (0,) * len(num_draft_tokens))
        names = list(self._names())[: len(num_draft_tokens)]
        verdict = self.rule(p, draft, noise, self._allowance(names))
        out = torch.full((len(num_draft_tokens), max_spec_len + 1), -1, dtype=torch.int32)
        for b, path in enumerate(verdict.path):
            row = [*(draft.tokens[k] for k in path), verdict.next_token[b]]
            out[b, : len(row)] = torch.tensor(row, dtype=torch.int32)
        self.tap.enter(draft.counts, verdict, list(sampling_metadata.generators))
        for name, spent in zip(names, verdict.bias, strict=False):
            self._left[name] = self._left.get(name, self.rule.tv_limit) - spent
        return out.to(device)

    def _allowance(self, names: Sequence[str]) -> list[float] | None:
        """What each output may still spend."""
        if self.rule.lossless:
            return None
        if len(self._left) > 4 * len(names) + 1024:
            self._left = {name: self._left[name] for name in names if name in self._left}
        return [max(0.0, self._left.get(name, self.rule.tv_limit)) for name in names]


def laid_out(
    token: Int[Tensor, "n"],
    drafted: Sequence[int],
    q: Float[Tensor, "n V"] | None,
    p: Float[Tensor, "n V"],
    bonus: Int[Tensor, "B 1"],
) -> tuple[Float[Tensor, "M V"], Draft]:
    """vLLM's rows as ours: B anchors, then the nodes. p: [n] distributions that verify each draft token.

    Row b verifies the first draft token of request b, the row of a node the token after it. What follows the last draft token has
    been drawn already (`bonus`), so its row is the point mass there.
    """
    vocab, host, last = p.shape[1], p.cpu(), bonus.reshape(-1).tolist()
    tokens = token.tolist()
    trees, q_rows, anchors, nodes, at = [], list[int](), list[Tensor](), list[Tensor](), 0
    for b, count in enumerate(drafted):
        own = tokens[at : at + count]
        real = next((i for i, t in enumerate(own) if t < 0), count)  # placeholders are no drafts
        end = torch.zeros(vocab, dtype=host.dtype)
        end[last[b]] = 1.0
        rows = [host[at + i] for i in range(real)]
        rows.append(end if real == count else host[at + real])
        anchors.append(rows[0])
        nodes += rows[1:]
        trees.append((own[:real], list(range(-1, real - 1))))
        q_rows += range(at, at + real)
        at += count
    proposal = None if q is None else Proposal(q.cpu(), tuple(q_rows))
    return torch.stack(anchors + nodes), Draft.join(trees, proposal)


def _owner(drafted: Sequence[int], device: torch.device) -> Tensor:
    count = torch.tensor(drafted, device=device)
    return torch.repeat_interleave(torch.arange(len(drafted), device=device), count, output_size=sum(drafted))


def _greedy(metadata: Any, owner: Tensor) -> Tensor | bool:
    """For every draft token whether its request is greedy; True or False for all of them."""
    if metadata.all_greedy:
        return True
    return False if metadata.all_random else (metadata.temperature == 0)[owner]


def _distributions(logits: Float[Tensor, "n V"], greedy: Tensor | bool) -> Float[Tensor, "n V"]:
    """The target's distributions; point masses where a request is greedy."""
    best = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
    if greedy is True:
        return best
    p = logits.softmax(-1, dtype=torch.float32)
    return p if greedy is False else torch.where(greedy[:, None], best, p)  # type: ignore[index]


def _seeds(generators: dict[int, torch.Generator], requests: int) -> list[int]:
    """A new seed for each request: from its own generator, or from the engine's."""
    fresh = torch.randint(0, 2**62, (requests,)).tolist()
    for b, generator in generators.items():
        if b < requests:
            fresh[b] = int(torch.randint(0, 2**62, (1,), generator=generator, device=generator.device))
    return fresh
