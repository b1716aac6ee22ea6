"""What forwards cost on this machine, in units of a plain target forward: measured, or given by the user."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from outrider.evaluate.scoring.score import Clock, chain_rows
from outrider.protocols import Target
from outrider.types import Draft, Rows


@dataclass(frozen=True, slots=True)
class Costs:
    """Forwards in units of a plain target forward. verify[g]: a forward of g + 1 rows. source: measured or given."""

    draft: float
    verify: tuple[float, ...]
    source: str
    target_seconds: float | None = None


@torch.inference_mode()
def measure_costs(
    target: Target, draft: Target, tokens: Sequence[int], clock: Clock, *, longest: int = 16, rounds: int = 10
) -> Costs:
    """Costs of target forwards of 1 .. longest + 1 rows and of a draft forward of one row, behind a cache of `tokens`.

    The fastest of interleaved rounds each, since a shared machine's noise only adds; every round has an order of its own, since a
    forward that always followed the widest one would always find the caches as that one left them. As fewer rows cannot cost more
    than more rows, each cost is at most those of the longer forwards. The first round warms up and is thrown away. Sampling,
    judging and the engine's own work are not in these costs.
    """
    held = list(tokens)[: min(target.max_length, draft.max_length) - longest - 1]
    seconds: dict[tuple[str, int], list[float]] = {}
    caches = {}
    for name, model in (("target", target), ("draft", draft)):
        caches[name] = model.new_kv(1, len(held) + longest + 1)
        rows = Rows.assemble([0], [held], [0], Draft.empty(0, model.device), [False])
        clock.time(model.device, lambda m=model, r=rows, kv=caches[name]: m.forward(r, kv).logits)
        caches[name].commit(rows, [[]])
    work = [("draft", 1), *(("target", n) for n in range(1, longest + 2))]
    chance = random.Random(len(held))
    for turn in range(rounds + 1):
        for name, n in chance.sample(work, len(work)):
            model, kv = (target, caches["target"]) if name == "target" else (draft, caches["draft"])
            rows = chain_rows(model, (held * n)[:n], len(held))
            took = clock.time(model.device, lambda m=model, r=rows, c=kv: m.forward(r, c).logits)[1]
            kv.commit(rows, [[]])
            kv.truncate(0, len(held))
            if turn:
                seconds.setdefault((name, n), []).append(took)
    best = [min(seconds["target", n]) for n in range(1, longest + 2)]
    for i in reversed(range(longest)):
        best[i] = min(best[i], best[i + 1])
    return Costs(min(seconds["draft", 1]) / best[0], tuple(b / best[0] for b in best), "measured", best[0])
