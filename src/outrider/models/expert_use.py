"""How many experts the forwards of a running target touch, and what its rows therefore cost: measured while it decodes.

The native decoder says after every forward how many experts each layer touched. To these numbers the routing is fitted: all experts
are equally likely, and a row keeps the experts of the row above it with the probability for which the mean number of touched ones
over the forwards seen is that of `theory.experts`.
"""

from __future__ import annotations

from collections.abc import Sequence

from outrider.models.decoder import DecoderConfig
from outrider.theory.experts import Routing, VerificationCost

MOST_ROWS = 64
"""Rows of forwards that are learned from; longer ones are prompts, which touch almost all."""
EVERY = 32
"""Forwards between one fit and the next."""
KEEP = 4096.0
"""Forwards of one number of rows after which older ones fade."""


class ExpertUse:
    """Learns from forwards; called with a number of rows it tells what they read relative to one row, v(R)."""

    def __init__(self, config: DecoderConfig, share: float | None = None) -> None:
        e = config.experts
        assert e is not None
        self._experts, self._sparse = e, sum(e.sparse)
        self._seen: dict[int, tuple[float, float]] = {}  # rows -> forwards, mean of touched experts in a sparse layer
        self._due = EVERY
        self._cost = VerificationCost(
            Routing.uniform(e.count, e.used), _sparse_share(config) if share is None else share
        )

    @classmethod
    def of(cls, config: DecoderConfig, share: float | None = None) -> ExpertUse | None:
        """None for a decoder without layers of experts. share: of the bytes of a one-row forward that are experts'; None: that of
        the numbers."""
        return cls(config, share) if config.experts is not None and any(config.experts.sparse) else None

    @property
    def routing(self) -> Routing:
        """The fitted routing; independent rows until forwards of two and more rows were seen."""
        return self._cost.routing

    def learn(self, rows: int, touched: Sequence[int]) -> None:
        """A forward of so many rows of one sequence touched so many experts in each layer."""
        if not 2 <= rows <= MOST_ROWS:
            return
        n, mean = self._seen.get(rows, (0.0, 0.0))
        n = min(n + 1.0, KEEP)
        self._seen[rows] = n, mean + (sum(touched) / self._sparse - mean) / n
        self._due -= 1
        if self._due <= 0:
            self._due = EVERY
            self._cost = VerificationCost(self._fitted(), self._cost.sparse)

    def __call__(self, rows: float) -> float:
        return self._cost.relative(max(1.0, rows))

    def _fitted(self) -> Routing:
        """By bisection: the expected number falls as rows repeat."""
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            routing = Routing.uniform(self._experts.count, self._experts.used, middle)
            above = sum(n * (routing.touched(rows) - mean) for rows, (n, mean) in self._seen.items())
            low, high = (middle, high) if above > 0 else (low, middle)
        return Routing.uniform(self._experts.count, self._experts.used, low)


def _sparse_share(c: DecoderConfig) -> float:
    """Share of the weights a one-row forward reads that are experts'."""
    e = c.experts
    assert e is not None
    sparse = sum(e.sparse)
    experts = sparse * 3 * e.used * e.inner * c.hidden
    attention = 2 * (c.heads + c.kv_heads) * c.head_dim * c.hidden
    dense = c.layers * attention + (c.layers - sparse) * 3 * c.inner * c.hidden + sparse * e.count * c.hidden
    shared = sparse * 3 * e.shared * c.hidden
    return experts / (experts + dense + shared + c.vocab_size * c.hidden)
