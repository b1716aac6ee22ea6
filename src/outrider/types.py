"""The nouns: plain data that crosses between engine, target, rule and drafter. Imports torch and nothing of ours but noise.

Shapes: N rows, K nodes, B sequences with a verdict in this step, M = B + K scored rows, V vocabulary, H hidden size.
The *structure* of a step (who, where, parents, counts) is host data (tuples): it is known before anything is computed, so no
step waits for the device to learn its own shapes. Only tokens, laws and scores are tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.noise import Noise

if TYPE_CHECKING:
    from outrider.protocols import DraftLaw

Siblings = Literal["iid", "without_replacement", "hub"]
"""How several children of a node were drawn from one law: independently; each from what the earlier ones left; or as SpecHub's
pairs, the most likely token a and one other: the first from the law, the second a, or from the law without a if the first is a."""

POINT_MASS = -1
"""`Proposal.row` of a node that was not drawn from a law: it counts as a point mass, which is always lossless."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """The laws the nodes of a draft were drawn from. Siblings drawn from one law share its row; sibling order is draw order.

    probs:    [R, S] laws over the draft's support; rows sum to one.
    row:      K row numbers, POINT_MASS (-1) for a node without a law.
    support:  [S] target token of each column, or None when the columns are the target's vocabulary.
    siblings: how several nodes were drawn from one row.
    """

    probs: Float[Tensor, "R S"]
    row: tuple[int, ...]
    support: Int[Tensor, "S"] | None = None
    siblings: Siblings = "iid"

    def dense(self, rows: list[int], vocab_size: int) -> Float[Tensor, "r V"]:
        """The laws `rows` over the target's vocabulary."""
        probs = self.probs[rows]
        if self.support is None:
            return probs
        out = probs.new_zeros(len(rows), vocab_size)
        return out.index_copy_(1, self.support, probs)


@dataclass(frozen=True)
class Draft:
    """Proposals for B sequences as one flat forest: nodes of a sequence stand together, parents come before children.

    token:  [K] proposed tokens, int64.
    parent: K node numbers (of this draft), or -1 for a child of the anchor.
    counts: nodes of each sequence; their sum is K.
    q:      the laws the nodes were drawn from; None: every node is a point mass. None is always lossless (contract 1).
    """

    token: Int[Tensor, "K"]
    parent: tuple[int, ...]
    counts: tuple[int, ...]
    q: Proposal | None = None

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First node of each sequence, and K at the end: sequence b owns nodes offsets[b] : offsets[b + 1]."""
        out = [0]
        for n in self.counts:
            out.append(out[-1] + n)
        return tuple(out)

    @cached_property
    def is_chain(self) -> bool:
        """True when no node has a sibling: every node's parent is the node before it, or the anchor for the first."""
        first = set(self.offsets[:-1])
        return all(p == (-1 if k in first else k - 1) for k, p in enumerate(self.parent))

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """The proposed tokens on the host."""
        return tuple(self.token.tolist())

    def misshapen(self) -> str:
        """What makes the tensors and tuples of this draft disagree with each other, or an empty string."""
        nodes, q = len(self.parent), self.q
        if self.token.shape != (nodes,) or sum(self.counts) != nodes or any(n < 0 for n in self.counts):
            return f"{self.token.numel()} tokens and {nodes} parents for counts that sum to {sum(self.counts)}"
        if self.token.dtype is not torch.int64 or {type(n) for n in (*self.parent, *self.counts)} - {int}:
            return f"tokens of type {self.token.dtype}, or parents and counts that are no whole numbers"
        if q is None:
            return ""
        if not q.probs.is_floating_point() or (q.support is not None and q.support.dtype is not torch.int64):
            return f"laws of type {q.probs.dtype}, or a support that is not int64"
        if len(q.row) != nodes or q.probs.dim() != 2:
            return f"{len(q.row)} law numbers for {nodes} nodes, and laws of shape {tuple(q.probs.shape)}"
        if q.support is not None and q.support.shape != q.probs.shape[1:]:
            return f"a support of shape {tuple(q.support.shape)} for laws of shape {tuple(q.probs.shape)}"
        return ""

    def defect(self, sequences: int, depth: Sequence[int] | None = None) -> str:
        """What makes this no draft for `sequences` of at most `depth` levels each, or an empty string. Host data only.

        Tokens and probabilities are not looked at.
        """
        if problem := self.misshapen():
            return problem
        if len(self.counts) != sequences:
            return f"trees for {len(self.counts)} sequences instead of {sequences}"
        if self.q is not None and not all(POINT_MASS <= row < len(self.q.probs) for row in self.q.row):
            return f"law numbers outside its {len(self.q.probs)} laws"
        level: list[int] = []
        for b, low in enumerate(self.offsets[:-1]):
            for k in range(low, low + self.counts[b]):
                up = self.parent[k]
                if up != -1 and not low <= up < k:
                    return f"node {k} has parent {up}, which is not an earlier node of its sequence"
                level.append(1 + (level[up] if up >= 0 else 0))
                if depth is not None and level[k] > depth[b]:
                    return f"{level[k]} levels for sequence {b}, which was asked for {depth[b]}"
        return ""

    def path_to(self, node: int) -> tuple[int, ...]:
        """Node numbers from the anchor's child down to `node`."""
        out: list[int] = []
        while node >= 0:
            out.append(node)
            node = self.parent[node]
        return tuple(reversed(out))

    def children(self, b: int, parent: int) -> list[int]:
        """Children of `parent` (-1: the anchor) in sequence b, in draw order."""
        return [k for k in range(self.offsets[b], self.offsets[b + 1]) if self.parent[k] == parent]

    def take(self, index: list[int]) -> Draft:
        """The drafts of some of the sequences, in the order given; -1 stands for a sequence without a draft."""
        if list(index) == list(range(len(self.counts))):
            return self
        nodes = [k for b in index if b >= 0 for k in range(self.offsets[b], self.offsets[b + 1])]
        new = {-1: -1} | {k: i for i, k in enumerate(nodes)}
        q = self.q and Proposal(self.q.probs, tuple(self.q.row[k] for k in nodes), self.q.support, self.q.siblings)
        pick = torch.tensor(nodes, dtype=torch.int64, device=self.token.device)
        counts = tuple(self.counts[b] if b >= 0 else 0 for b in index)
        return Draft(self.token[pick], tuple(new[self.parent[k]] for k in nodes), counts, q)

    @staticmethod
    def empty(sequences: int, device: torch.device | str = "cpu") -> Draft:
        """No proposal for any of `sequences`: plain decoding."""
        return Draft(torch.empty(0, dtype=torch.int64, device=device), (), (0,) * sequences)


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one sequence in one forward: a prefix (prompt chunk, or just the anchor), then its draft nodes.

    Rows first : first + prefix + nodes of the forward. They are written to the cache at places
    cached : cached + prefix + nodes of `slot`. `parent` holds, for each *node*, its parent as an offset into the segment
    (prefix - 1 is the last prefix row). A prefix row sees the cached tokens and the prefix rows up to itself.
    scored: whether the last prefix row (and the nodes) get logits; False for a prompt chunk that is not the last one.
    """

    slot: int
    first: int
    cached: int
    prefix: int
    parent: tuple[int, ...]
    scored: bool

    @property
    def count(self) -> int:
        return self.prefix + len(self.parent)

    @property
    def is_chain(self) -> bool:
        """True when every row sees exactly the rows before it: attention is plain causal."""
        return all(p == self.prefix + i - 1 for i, p in enumerate(self.parent))


@dataclass(frozen=True)
class Rows:
    """What one target forward scores: all sequences flat, no padding.

    token:    [N] int64. position: [N] int64 absolute positions (siblings share one).
    segments: one per sequence, in order of rows.
    scored:   [M] rows that get logits: the last prefix rows of the B scored segments, then their K nodes.
    """

    token: Int[Tensor, "N"]
    position: Int[Tensor, "N"]
    segments: tuple[Segment, ...]
    scored: Int[Tensor, "M"]

    @cached_property
    def count(self) -> int:
        return sum(s.count for s in self.segments)

    @staticmethod
    def assemble(
        slots: list[int], prefixes: list[list[int]], cached: list[int], draft: Draft, scored: list[bool] | None = None
    ) -> Rows:
        """Lay out one forward. `draft` holds one (possibly empty) tree for each *scored* sequence, in order.

        slots, prefixes, cached, scored: per sequence its slot, the tokens to feed (at least one), the number of tokens
        already cached, and whether it gets a verdict (default: all).
        """
        wanted = [True] * len(slots) if scored is None else scored
        device = draft.token.device
        segments: list[Segment] = []
        token: list[int] = []
        position: list[int] = []
        anchors: list[int] = []
        nodes: list[int] = []
        proposed = draft.tokens
        b = 0
        for slot, prefix, start, want in zip(slots, prefixes, cached, wanted, strict=True):
            first, size = len(token), len(prefix)
            token += prefix
            position += range(start, start + size)
            parent: list[int] = []
            if want:
                anchors.append(first + size - 1)
                low = draft.offsets[b]
                for k in range(low, draft.offsets[b + 1]):
                    up = draft.parent[k]
                    parent.append(size - 1 if up < 0 else size + up - low)
                    position.append(position[first + parent[-1]] + 1)
                    nodes.append(len(token))
                    token.append(proposed[k])
                b += 1
            segments.append(Segment(slot, first, start, size, tuple(parent), want))
        as_tensor = lambda x: torch.tensor(x, dtype=torch.int64, device=device)  # noqa: E731
        return Rows(as_tensor(token), as_tensor(position), tuple(segments), as_tensor(anchors + nodes))


class Scores(NamedTuple):
    """What a target forward returns: logits of the scored rows, hidden states of all rows for the layers asked for."""

    logits: Float[Tensor, "M V"]
    hidden: tuple[Float[Tensor, "N H"], ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule decided for the B sequences, on the host. Every verdict emits accepted + 1 tokens per sequence.

    path:       per sequence the accepted nodes (numbers of the draft), anchor side first.
    next_token: per sequence the correction or bonus token: the new anchor.
    judged:     positions whose accept/reject coin was tossed: accepted, plus one if a rejection ended the path.
    risk:       the ledger: sum over judged positions of the rule's own rejection probability before the coin.
    spread:     sum over judged positions of risk * (1 - risk): the predictable variance of risk - rejections.
    bias:       sum of the exact total-variation bias of a lossy rule; zero for every lossless one.
    """

    path: tuple[tuple[int, ...], ...]
    next_token: tuple[int, ...]
    judged: tuple[int, ...]
    risk: tuple[float, ...]
    spread: tuple[float, ...]
    bias: tuple[float, ...]

    @property
    def accepted(self) -> tuple[int, ...]:
        return tuple(len(p) for p in self.path)


@dataclass(frozen=True, slots=True)
class SequenceView:
    """What drafters and laws may know of one sequence.

    slot:    its index in every persistent table. seed: its request seed.
    tokens:  prompt and output so far, the anchor last (read only: the engine's own list).
    prompt:  how many of them are the prompt.
    cached:  how many of them are in the target's cache (after the step: all but the anchor, or the prompt chunks so far).
    params:  the request's sampling parameters (`params.SamplingParams`).
    """

    slot: int
    seed: int
    tokens: list[int]
    prompt: int
    cached: int
    params: object


@dataclass(frozen=True, slots=True)
class Evidence:
    """All a drafter may look at after a step. The same object after a prompt chunk as after a decode step.

    rows, scores: the step's forward. draft, verdict: what was proposed to the scored sequences and what became of it.
    sequences:    every live sequence that took part in the step, or joined it, in the order of the draft wanted.
    source:       for each of `sequences` the number of its segment in `rows`, or -1 if it was not in the forward.
    judged:       for each of `sequences` its number in `draft` and `verdict`, or -1 if it had no verdict in this step.
    noise:        noise at the new anchors, one entry per sequence.
    law:          the target's processors as a function a drafter may apply to its own logits (temperature, top-k, ...).
    """

    rows: Rows
    scores: Scores
    draft: Draft
    verdict: Verdict
    sequences: tuple[SequenceView, ...]
    source: tuple[int, ...]
    judged: tuple[int, ...]
    noise: Noise
    law: DraftLaw

    def kept_rows(self, i: int) -> list[int]:
        """Rows of the forward that sequence i now has in the target's cache, in order."""
        if self.source[i] < 0:
            return []
        segment = self.rows.segments[self.source[i]]
        out = list(range(segment.first, segment.first + segment.prefix))
        b = self.judged[i]
        if b >= 0:
            low = self.draft.offsets[b]
            out += [segment.first + segment.prefix + k - low for k in self.verdict.path[b]]
        return out


PHASES: tuple[str, ...] = ("target", "rule", "draft", "host")
_SUMS = ("steps", "proposed", "judged", "accepted", "dropped", "cut", "rejected", "emitted", "risk", "spread", "bias")


@dataclass(slots=True)
class Counts:
    """Raw counts, only ever summed; ratios are formed at the edge, as ratios of sums.

    steps: sequence-steps with a verdict. proposed: nodes proposed. judged, rejected: see `Verdict`. accepted: accepted nodes that
    were emitted. emitted: tokens. A text may end (end of text, stop string, limit) within the draft of its last step: dropped are
    the accepted nodes behind that end, cut the steps that lost their own token with it. So judged = accepted + dropped + rejected
    and emitted = accepted + steps - cut. risk, spread, bias: sums of the ledger, over all that was judged.
    accepted_at[d]: steps whose node at depth d + 1 was accepted and emitted; judged_at[d]: steps in which depth d + 1 was judged,
    none behind an end.
    """

    steps: int = 0
    proposed: int = 0
    judged: int = 0
    accepted: int = 0
    rejected: int = 0
    emitted: int = 0
    risk: float = 0.0
    spread: float = 0.0
    bias: float = 0.0
    accepted_at: list[int] = field(default_factory=list)
    judged_at: list[int] = field(default_factory=list)
    dropped: int = 0
    cut: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the steps: what plain decoding would have taken steps for."""
        return self.accepted + self.steps - self.cut

    def add(
        self,
        proposed: int,
        accepted: int,
        judged: int,
        risk: float,
        spread: float,
        bias: float,
        kept: int | None = None,
    ) -> None:
        """One sequence-step with a verdict. kept: how many of its accepted + 1 tokens were emitted; None: all of them."""
        kept = accepted + 1 if kept is None else kept
        self.steps += 1
        self.proposed += proposed
        self.judged += judged
        self.accepted += min(accepted, kept)
        self.dropped += max(accepted - kept, 0)
        self.cut += kept <= accepted
        self.rejected += judged - accepted
        self.risk += risk
        self.spread += spread
        self.bias += bias
        self._grow(min(judged, kept))
        for d in range(min(judged, kept)):
            self.judged_at[d] += 1
        for d in range(min(accepted, kept)):
            self.accepted_at[d] += 1

    def merge(self, other: Counts) -> None:
        """Add the sums of `other`."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._grow(len(other.judged_at))
        for d, (a, j) in enumerate(zip(other.accepted_at, other.judged_at, strict=True)):
            self.accepted_at[d] += a
            self.judged_at[d] += j

    def _grow(self, depth: int) -> None:
        while len(self.judged_at) < depth:
            self.accepted_at.append(0)
            self.judged_at.append(0)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as every sink sees it: host numbers only.

    rows: rows of the forward; scored: sequences with a verdict; running, waiting: sequences after the step;
    seconds: wall-clock seconds of each of PHASES; counts: the step's sums. fresh: those of the sequences whose seed the engine
    chose: a client's own seed may repeat its noise, and then the laws of the ledger do not hold over several requests.
    """

    rows: int
    scored: int
    running: int
    waiting: int
    seconds: dict[str, float]
    counts: Counts
    fresh: Counts = field(default_factory=Counts)
