"""A drafter of vLLM that rests while nothing is drafted.

With draft length 0 vLLM's drafter still reads every token, in a forward of its own in every step, to keep its cache whole: a tenth
of the shipped target's step. Here its inputs are put aside instead, and read together, in one forward, when a draft is asked for
again, when prompts are read, or when ROOM steps wait or half as many rows as a forward takes. Its cache then holds what it would
have held. (What waits of a sequence that has no place in the step that catches up is lost: its drafts are less accurate, and exact
as before.)
Shapes: n rows of a step, B sequences, M rows of a forward that catches up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROOM = 256
"""Steps whose rows wait at most. What waits of a sequence that ends is never read."""
TAKES = (
    "num_speculative_tokens",
    "target_token_ids",
    "target_positions",
    "target_hidden_states",
    "next_token_ids",
    "token_indices_to_sample",
    "common_attn_metadata",
)
"""Arguments of vLLM's `propose`, by name: a drafter rests only where it takes these."""
METHODS = ("eagle", "eagle3", "draft_model", "dflash")
"""Methods whose drafter takes a step's rows of every sequence, however many these are, and makes its own inputs of them."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """What the drafter reads of a step: tokens, positions and hidden states of the target, and places in the cache.

    hidden: of several layers, which the drafter reads side by side.
    """

    token: Int[Tensor, "n"]
    position: Int[Tensor, "n"]
    hidden: tuple[Float[Tensor, "n H"], ...]
    place: Int[Tensor, "n"]

    @staticmethod
    def of(given: dict[str, Any]) -> StepRows:
        """Of the arguments of `propose`."""
        token, position, hidden = (given[f"target_{x}"] for x in ("token_ids", "positions", "hidden_states"))
        return StepRows(token, position, (hidden,), given["common_attn_metadata"].slot_mapping[: len(token)])

    def kept(self) -> StepRows:
        """A copy: vLLM's buffers are written again in the next step."""
        return replace(self.apart(), hidden=tuple(h.clone() for h in self.hidden))

    def apart(self) -> StepRows:
        """A copy of all but the hidden states, for those that are in no buffer."""
        return StepRows(self.token.clone(), self.position.clone(), self.hidden, self.place.clone())

    @staticmethod
    def together(steps: Sequence[StepRows], rows: Sequence[int]) -> StepRows:
        """The rows with these numbers, counted over the steps."""
        chosen = torch.tensor(rows)
        token, position, place = (
            torch.cat([getattr(s, x) for s in steps])[chosen] for x in ("token", "position", "place")
        )
        hidden = torch.cat([torch.cat(s.hidden, dim=-1) for s in steps])[chosen]
        return StepRows(token, position, (hidden,), place)


@dataclass
class Waiting:
    """Steps that wait, each with one row of every sequence. names: of the sequences. count: rows of all."""

    names: list[Sequence[str]] = field(default_factory=list)
    steps: list[StepRows] = field(default_factory=list)
    count: int = 0

    def add(self, names: Sequence[str], step: StepRows) -> None:
        """Another step."""
        self.names.append(names)
        self.steps.append(step)
        self.count += len(names)

    def before(self, names: Sequence[str], positions: Sequence[int]) -> list[list[int]]:
        """For each of these sequences, of which a step begins at these positions, the numbers of its rows that the step follows
        on, counted over the steps. A sequence that began again has those since then."""
        rows, ends, first = dict[str, list[int]](), dict[str, int](), 0
        for there, step in zip(self.names, self.steps, strict=True):
            for row, (name, position) in enumerate(zip(there, step.position.tolist(), strict=True)):
                if ends.get(name) != position:
                    rows[name] = []
                rows[name].append(first + row)
                ends[name] = position + 1
            first += len(there)
        return [rows[n] if ends.get(n) == at else [] for n, at in zip(names, positions, strict=True)]


class Resting:
    """Stands before `propose` of a drafter of vLLM. names: the sequences of the step, in its order. most: rows of a forward."""

    def __init__(self, inner: Callable[..., Any], names: Callable[[], Sequence[str]], most: int) -> None:
        self.inner, self._names, self._most = inner, names, most
        self._waiting = Waiting()

    def has_room(self, rows: int) -> bool:
        """Whether another step of so many rows may wait: half of a forward is left for the step that catches up."""
        return len(self._waiting.steps) < ROOM and self._waiting.count + 2 * rows <= max(self._most // 2, 2 * rows)

    def put_aside(self, names: Sequence[str], step: StepRows) -> None:
        """A step of one row of every sequence waits. step: none of vLLM's buffers."""
        self._waiting.add(names, step)

    def __call__(self, **given: Any) -> Any:
        """Draft tokens [B, K], as vLLM's own; [B, 0] without a forward where it can rest."""
        about, waiting = given["common_attn_metadata"], self._waiting
        names = list(self._names())[: about.num_reqs]
        alone = about.max_query_len == 1
        # rows of rejected drafts, which are vLLM's business, are in a step behind one that drafted: then nothing waits
        if len(names) != about.num_reqs or not (waiting.steps or alone) or _of_images(given):
            self._waiting = Waiting()
            return self.inner(**given)
        step = StepRows.of(given)
        if given["num_speculative_tokens"] == 0 and alone and self.has_room(len(names)):
            self.put_aside(names, step.kept())
            return torch.empty(len(names), 0, dtype=torch.int64, device=step.token.device)
        starts = about.query_start_loc_cpu[: about.num_reqs + 1].tolist()
        late = waiting.before(names, step.position[starts[:-1]].tolist())
        self._waiting = Waiting()
        fits = sum(map(len, late)) + len(step.token) + len(names) <= self._most  # a draft model adds a row to each
        return self.inner(**(given | _merged(about, waiting, late, step, starts) if any(late) and fits else given))


def _of_images(given: dict[str, Any]) -> bool:
    """Whether rows have embeddings of their own, or positions in three dimensions."""
    return given.get("mm_embed_inputs") is not None or given["target_positions"].dim() != 1


def _merged(
    about: Any, waiting: Waiting, late: Sequence[Sequence[int]], step: StepRows, starts: Sequence[int]
) -> dict[str, Any]:
    """The arguments of `propose` for what waits of every sequence and the rows of this step behind it."""
    rows, counts = list[int](), [0]
    for old, a, b in zip(late, starts, starts[1:], strict=False):
        rows += [*old, *range(waiting.count + a, waiting.count + b)]
        counts.append(len(old) + b - a)
    both = StepRows.together([*waiting.steps, step], rows)
    begins = torch.tensor(counts).cumsum(0).to(about.query_start_loc_cpu.dtype)
    wanted = {
        "query_start_loc": begins.to(about.query_start_loc.device),
        "query_start_loc_cpu": begins,
        "num_actual_tokens": len(rows),
        "max_query_len": max(counts),
        "slot_mapping": both.place,
        "positions": None if getattr(about, "positions", None) is None else both.position,
    }
    have = {f.name for f in fields(about)}
    return {
        "target_token_ids": both.token,
        "target_positions": both.position,
        "target_hidden_states": both.hidden[0],
        "token_indices_to_sample": wanted["query_start_loc"][1:] - 1,
        "common_attn_metadata": replace(about, **{n: v for n, v in wanted.items() if n in have}),
    }


def let_rest(runner: Any, method: str, most: int) -> str:
    """Put `Resting` before the drafter of a runner; why not, if that is impossible.

    method: of the speculative configuration. most: rows of a forward that its buffers hold. On GPUs it was never tried: reading
    positions would wait for the device.
    """
    drafter, device = getattr(runner, "drafter", None), getattr(runner, "device", None)
    if method not in METHODS or drafter is None:
        return f"drafters of method {method!r} read every token themselves"
    if getattr(device, "type", str(device)) != "cpu":
        return "on GPUs drafters read every token"
    if not set(TAKES) <= set(inspect.signature(drafter.propose).parameters):
        return "this vLLM's drafter has another interface than those of 0.32 and 0.33"
    drafter.propose = Resting(drafter.propose, lambda: runner.input_batch.req_ids, most)
    return ""
