"""Plain data passed between engine, target, rule and drafter. Imports torch and plain values only.

Shapes: N rows, K nodes, B sequences with a verdict in this step, M = B + K scored rows, V vocabulary, H hidden size.
The *structure* of a step (slots, places, parents, counts) is host data (tuples): it is known before anything is computed, so no
step waits for the device for its own shapes. Only tokens, distributions and scores are tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.deprecated import Renamed
from outrider.moved import names_of
from outrider.noise import Noise
from outrider.params import SamplingParams
from outrider.pictured import Given
from outrider.transfer import upload

Siblings = Literal["iid", "without_replacement", "hub"]
"""How several children of a node were drawn from one distribution: independently; each from the rest after the earlier ones; or as
SpecHub's pairs: the first from the distribution, the second its most likely token, or another one if the first is that."""

Tree = tuple[Sequence[int], Sequence[int]]
"""Draft tokens of one sequence and the parent of each: a number among them, or -1 for the anchor."""

TOLERANCE = 1e-3
"""Allowed deviation of a row sum of `Proposal.probs` from one; float32 softmax over 200,000 entries stays below 1e-5."""

POINT_MASS = -1
"""`Proposal.row` of a node that was not drawn from a distribution: it counts as a point mass, which is always lossless."""
__getattr__ = names_of(__name__)  # sums and records, which had been here


@dataclass(frozen=True, slots=True)
class Proposal:
    """The distributions the nodes of a draft were drawn from. Siblings of one distribution share its row, in draw order.

    probs:    [R, S] distributions over the draft's support; rows sum to one.
    row:      K row numbers, POINT_MASS (-1) for a node without a distribution.
    support:  [S] target token of each column, or None when the columns are the target's vocabulary.
    siblings: how several nodes were drawn from one row.
    sound:    `probs` itself if the code that drew from it has checked that each row sums to one and is not negative; else None.
    """

    probs: Float[Tensor, "R S"]
    row: tuple[int, ...]
    support: Int[Tensor, "S"] | None = None
    siblings: Siblings = "iid"
    sound: Tensor | None = None

    def dense(self, rows: list[int], vocab_size: int) -> Float[Tensor, "r V"]:
        """The distributions `rows` over the target's vocabulary."""
        probs = self.probs[rows]
        if self.support is None:
            return probs
        return probs.new_zeros(len(rows), vocab_size).index_copy_(1, self.support, probs)


@dataclass(frozen=True)
class Draft:
    """Proposals for B sequences as one flat forest: nodes of a sequence are contiguous, parents come before children.

    token:  [K] proposed tokens, int64.
    parent: K node numbers (of this draft), or -1 for a child of the anchor.
    counts: nodes of each sequence; their sum is K.
    q:      the distributions the nodes were drawn from; None: every node is a point mass. None is always lossless (contract 1).
    """

    token: Int[Tensor, "K"]
    parent: tuple[int, ...]
    counts: tuple[int, ...]
    q: Proposal | None = None

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First node of each sequence, and K at the end: sequence b owns nodes offsets[b] : offsets[b + 1]."""
        return (0, *accumulate(self.counts))

    @cached_property
    def is_chain(self) -> bool:
        """True when no node has a sibling: every node's parent is the node before it, or the anchor for the first."""
        first = set(self.offsets[:-1])
        return all(p == (-1 if k in first else k - 1) for k, p in enumerate(self.parent))

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """The proposed tokens on the host; a draft made by `join` has them there from the start."""
        return tuple(self.token.tolist())

    def nodes(self, b: int) -> range:
        """The nodes of sequence b."""
        return range(self.offsets[b], self.offsets[b + 1])

    def row(self, b: int, node: int = -1) -> int:
        """Number among the scored rows of a node of sequence b; node -1: its anchor."""
        return b if node < 0 else len(self.counts) + node

    def local(self, b: int, node: int) -> int:
        """Number of a node among the nodes of its sequence b, 0 for the first; -1 for the anchor (-1)."""
        return node if node < 0 else node - self.offsets[b]

    @cached_property
    def parent_rows(self) -> tuple[int, ...]:
        """[K] For every node the scored row that verifies it: its parent's, or its sequence's anchor's."""
        below, owner = len(self.counts), self.sequence_of_row
        return tuple(owner[below + k] if up < 0 else below + up for k, up in enumerate(self.parent))

    @cached_property
    def sequence_of_row(self) -> tuple[int, ...]:
        """[M] The sequence that each scored row belongs to."""
        return (*range(len(self.counts)), *(b for b, n in enumerate(self.counts) for _ in range(n)))

    @cached_property
    def path_tokens(self) -> tuple[tuple[int, ...], ...]:
        """[M] For every scored row the draft tokens from the anchor down to it; none for the anchors."""
        out: list[tuple[int, ...]] = [()] * len(self.counts)
        for above, token in zip(self.parent_rows, self.tokens, strict=True):
            out.append((*out[above], token))
        return tuple(out)

    def path_to(self, node: int) -> tuple[int, ...]:
        """Node numbers from the anchor's child down to `node`."""
        out = () if node < 0 else (node,)
        while out and (up := self.parent[out[0]]) >= 0:
            out = (up, *out)
        return out

    def children(self, b: int, parent: int) -> list[int]:
        """Children of `parent` (-1: the anchor) in sequence b, in draw order."""
        return [k for k in self.nodes(b) if self.parent[k] == parent]

    def tree(self, b: int) -> Tree:
        """Tokens of sequence b, and their parents numbered within it."""
        low, end = self.offsets[b], self.offsets[b + 1]
        return self.tokens[low:end], [up if up < 0 else up - low for up in self.parent[low:end]]

    def take(self, index: Sequence[int]) -> Draft:
        """The drafts of some sequences, in the order given; -1: a sequence without a draft."""
        if list(index) == list(range(len(self.counts))):
            return self
        nodes = [k for b in index if b >= 0 for k in self.nodes(b)]
        q = self.q and replace(self.q, row=tuple(self.q.row[k] for k in nodes))
        return Draft.join([self.tree(b) if b >= 0 else ((), ()) for b in index], q, self.token.device)

    @staticmethod
    def join(trees: Sequence[Tree], q: Proposal | None = None, device: torch.device | str = "cpu") -> Draft:
        """One draft with a tree for each sequence. Its tokens are known on the host, so they are never read from `device`."""
        tokens, parent = list[int](), list[int]()
        for own, parents in trees:
            parent += [up if up < 0 else up + len(tokens) for up in parents]
            tokens += own
        counts = tuple(len(own) for own, _ in trees)
        draft = Draft(upload(tokens, torch.int64, torch.device(device)), tuple(parent), counts, q)
        draft.__dict__["tokens"] = tuple(tokens)  # where `cached_property` keeps it
        return draft

    @staticmethod
    def empty(sequences: int, device: torch.device | str = "cpu") -> Draft:
        """A draft without proposals for `sequences` sequences: plain decoding."""
        return Draft.join([((), ())] * sequences, device=device)


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one sequence in one forward: a prefix (prompt chunk, or just the anchor), then its draft nodes.

    Rows first : first + prefix + nodes of the forward. They are written to the cache at places
    cached : cached + prefix + nodes of `slot`. `parent` holds, for each *node*, its parent as an offset into the segment
    (prefix - 1 is the last prefix row). A prefix row sees the cached tokens and the prefix rows up to itself.
    scored: whether the last prefix row (and the nodes) get logits; False for a prompt chunk that is not the last one.
    view:   ranges (from, to) of the cached tokens that the rows see, increasing; none: all. Only targets with `views` read it.
    """

    slot: int
    first: int
    cached: int
    fed: int
    parent: tuple[int, ...]
    scored: bool
    view: tuple[tuple[int, int], ...] = ()

    @property
    def count(self) -> int:
        return self.fed + len(self.parent)

    @property
    def is_chain(self) -> bool:
        """True if every row sees exactly the rows before it: plain causal attention."""
        return all(p == self.fed + i - 1 for i, p in enumerate(self.parent))


@dataclass(frozen=True)
class Rows:
    """The rows of one target forward: all sequences flat, no padding. A drafter may ask for some of the scored rows, in any order.

    token:    [N] int64. position: [N] int64 absolute positions (siblings share one). segments: one per sequence, in order of rows.
    scored:   [M] rows that get logits: the last prefix rows of the B scored segments, then their K nodes. given: of images.
    """

    token: Int[Tensor, "N"]
    position: Int[Tensor, "N"]
    segments: tuple[Segment, ...]
    scored: Int[Tensor, "M"]
    given: Given | None = None

    @cached_property
    def count(self) -> int:
        return sum(s.count for s in self.segments)

    @cached_property
    def scored_rows(self) -> tuple[tuple[int, ...], ...]:
        """For each segment the numbers of its rows among the scored rows: its anchor, then its nodes; none if it is not scored."""
        anchors, nodes = 0, sum(s.scored for s in self.segments)
        out: list[tuple[int, ...]] = []
        for s in self.segments:
            out.append((anchors, *range(nodes, nodes + len(s.parent))) if s.scored else ())
            anchors, nodes = anchors + s.scored, nodes + len(s.parent)
        return tuple(out)

    @staticmethod
    def assemble(
        slots: list[int], prefixes: list[list[int]], cached: list[int], draft: Draft, scored: list[bool] | None = None
    ) -> Rows:
        """Lay out one forward. `draft` holds one (possibly empty) tree for each *scored* sequence, in order.

        slots, prefixes, cached, scored: per sequence its slot, the tokens to feed (at least one), the number of tokens
        already cached, and whether it gets a verdict (default: all).
        """
        wanted = [True] * len(slots) if scored is None else scored
        trees = map(draft.tree, range(len(draft.counts)))
        segments: list[Segment] = []
        token, position, anchors, nodes = list[int](), list[int](), list[int](), list[int]()
        for slot, prefix, start, want in zip(slots, prefixes, cached, wanted, strict=True):
            first, size = len(token), len(prefix)
            token += prefix
            position += range(start, start + size)
            if want:
                anchors.append(first + size - 1)
            own, parents = next(trees) if want else ((), ())
            parent = tuple(size + up for up in parents)  # -1 is the anchor: the last row of the prefix
            for up in parent:
                position.append(position[first + up] + 1)
            nodes += range(len(token), len(token) + len(own))
            token += own
            segments.append(Segment(slot, first, start, size, parent, want))
        place = partial(upload, dtype=torch.int64, device=draft.token.device)
        return Rows(place(token), place(position), tuple(segments), place(anchors + nodes))


class Scores(NamedTuple):
    """The result of a target forward: logits of the scored rows, and hidden states of all rows for the requested layers.

    replayed: tokens that were read again besides, because a state that cannot be cut had to be made anew after a rejection.
    """

    logits: Float[Tensor, "M V"]
    hidden: tuple[Float[Tensor, "N H"], ...] = ()
    replayed: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """A rule's decisions for the B sequences, on the host. Every verdict emits accepted + 1 tokens per sequence.

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
    """The view of one sequence that drafters and logits processors get.

    slot:    its index in every persistent table. seed: its request seed.
    tokens:  prompt and output so far, the anchor last (read only: the engine's own list). prompt: how many of them are the prompt.
    cached:  how many of them are in the target's KV cache (after the step: all but the anchor, or the prompt chunks so far).
    params:  the request's sampling parameters. shares: whether a drafter may let it use what others of the same salt have computed.
    """

    slot: int
    seed: int
    tokens: list[int]
    prompt: int
    cached: int
    params: SamplingParams
    shares: bool = True


LogitsProcessing = Callable[
    [Float[Tensor, "n V"], Sequence[SequenceView], Sequence[Sequence[int]]], Float[Tensor, "n V"]
]
"""The request's logits processors, for a drafter's own logits: (logits, sequences, paths) -> distributions. Row i uses the
parameters of `sequences[i]`, whose tokens are followed by the tokens `paths[i]`."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything a drafter may read after a step. The same object after a prompt chunk and after a decode step.

    rows, scores: the step's forward. draft, verdict: the proposals for the scored sequences and the decisions.
    sequences:    every live sequence that took part in the step, or joined it, in the order of the next draft.
    segment_index: for each of `sequences` the number of its segment in `rows`, or -1 if it was not in the forward.
    verdict_index: for each of `sequences` its number in `draft` and `verdict`, or -1 if it had no verdict in this step.
    noise:        noise at the new anchors, one entry per sequence.
    pipeline:     the logits processors as a function a drafter may apply to its own logits (temperature, top-k, ...).
    """

    rows: Rows
    scores: Scores
    draft: Draft
    verdict: Verdict
    sequences: tuple[SequenceView, ...]
    segment_index: tuple[int, ...]
    verdict_index: tuple[int, ...]
    noise: Noise
    pipeline: LogitsProcessing
    source = Renamed("segment_index")
    judged = Renamed("verdict_index")
    law = Renamed("pipeline")

    def accepted_rows(self, i: int) -> list[int]:
        """Rows of the forward that sequence i now has in the target's KV cache, in order."""
        if self.segment_index[i] < 0:
            return []
        s, b = self.rows.segments[self.segment_index[i]], self.verdict_index[i]
        path = () if b < 0 else self.verdict.path[b]
        return [*range(s.first, s.first + s.fed), *(s.first + s.fed + self.draft.local(b, k) for k in path)]
