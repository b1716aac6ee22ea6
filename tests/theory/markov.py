"""Two Markov chains as target and draft, and literal speculative decoding with them: what formulas are compared with."""

from __future__ import annotations

import itertools

import numpy as np

from outrider.theory import replay as r


class Chain:
    """Target p and draft q, two random Markov kernels over V states."""

    def __init__(self, states: int = 5, seed: int = 3, blur: float = 0.9) -> None:
        rng = np.random.default_rng(seed)
        self.p = rng.dirichlet(np.full(states, 0.6), states)
        self.q = 0.5 * self.p + 0.5 * rng.dirichlet(np.full(states, blur), states)
        self.rng, self.states = rng, states

    def draw(self, law: np.ndarray) -> int:
        total = law.cumsum()
        return int(min(np.searchsorted(total, self.rng.random() * total[-1], side="right"), self.states - 1))

    def decode(self, size: int, length: int, drafting: str, verification: str) -> tuple[list[int], int, int]:
        """Literal speculative decoding of `size` tokens; the tokens, the calls and the rejections."""
        x, calls, rejected = [0], 0, 0
        while len(x) - 1 < size:
            calls += 1
            budget = min(length, size - (len(x) - 1) - 1) if calls > 1 else 0
            greedy = drafting == "greedy"
            state, draft = x[-1], []
            for _ in range(budget):
                state = int(self.q[state].argmax()) if greedy else self.draw(self.q[state])
                draft.append(state)
            kept, last = (self.block if verification == "block" else self.token)(x[-1], draft, greedy)
            rejected += kept < budget
            x += [*draft[:kept], last]
        return x[1:], calls, rejected

    def law_of_draft(self, state: int, greedy: bool) -> np.ndarray:
        return np.eye(self.states)[self.q[state].argmax()] if greedy else self.q[state]

    def token(self, state: int, draft: list[int], greedy: bool) -> tuple[int, int]:
        for i, y in enumerate(draft):
            p, q = self.p[state], self.law_of_draft(state, greedy)
            if self.rng.random() * q[y] > p[y]:
                return i, self.draw(np.maximum(p - q, 0))
            state = y
        return len(draft), self.draw(self.p[state])

    def block(self, state: int, draft: list[int], greedy: bool) -> tuple[int, int]:
        """Sun et al., ICLR 2025, Algorithm 2."""
        assert not greedy
        path = [state, *draft]
        ratio = [1.0]
        for a, b in itertools.pairwise(path):
            ratio.append(min(ratio[-1] * self.p[a, b] / self.q[a, b], 1.0))
        kept = 0
        for i in range(1, len(draft) + 1):
            if i == len(draft):
                h = ratio[i]
            else:
                mass = np.maximum(ratio[i] * self.p[path[i]] - self.q[path[i]], 0).sum()
                h = mass / (mass + 1 - ratio[i]) if mass + 1 - ratio[i] > 0 else 1.0
            if self.rng.random() <= h:
                kept = i
        if kept == len(draft):
            return kept, self.draw(self.p[path[kept]])
        return kept, self.draw(np.maximum(ratio[kept] * self.p[path[kept]] - self.q[path[kept]], 0))

    def log(self, x: list[int], name: str) -> r.Text:
        before = [0, *x[:-1]]
        p, q = self.p[before], self.q[before]
        rows = np.arange(len(x))
        best = q.argmax(1)
        return r.Text(
            np.log(p[rows, x]),
            np.log(q[rows, x]),
            hit=best == np.array(x),
            tv=0.5 * np.abs(p - q).sum(1),
            risk=1 - p[rows, best],
            name=name,
            prompt=name,
        )
