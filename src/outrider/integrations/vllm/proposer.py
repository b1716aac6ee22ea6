"""Our drafters inside vLLM: what `--speculative-config '{"method": "custom_class", ...}'` calls after every step.

vLLM hands over the rows of its batch (tokens and their number), no names: rows are swapped when requests end, and used again. A row
is recognised by its text: each slot of ours keeps the tokens it stands for, and a row belongs to the slot whose tokens it
continues. Under our worker class the proposer also knows the requests themselves, and so their predicted outputs and grammars.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from outrider.contained import Contained
from outrider.drafters.none import NoDraft
from outrider.integrations.vllm.drafting import Drafting, Knowledge
from outrider.integrations.vllm.lengths import Lengths, SeenStep, lengths_of
from outrider.integrations.vllm.scheduler import note_of
from outrider.integrations.vllm.settings import Settings
from outrider.protocols import Drafter
from outrider.types import SequenceView

logger = logging.getLogger("vllm.outrider")


@dataclass(slots=True)
class _Held:
    """A sequence that a slot stands for. text: its tokens so far. drafted: tokens of the draft that the next step verifies."""

    text: np.ndarray
    view: SequenceView
    drafted: int = 0
    name: str = ""


class Slots:
    """Which of our slots stands for a row of vLLM's batch. count: slots, at least the rows of a batch."""

    def __init__(self, count: int) -> None:
        self.held: dict[int, _Held] = {}
        self.by_row: dict[int, int] = {}
        self.count = count

    def assign(self, rows: dict[int, np.ndarray]) -> tuple[dict[int, int], list[int]]:
        """The slot of each row (its number and its tokens), and the slots whose sequences are gone or new.

        A row keeps its slot if its tokens continue the slot's; otherwise any free slot whose tokens it continues, the longest
        first; otherwise a free slot is given to a new sequence.
        """
        given: dict[int, int] = {}
        taken: set[int] = set()
        for row, tokens in rows.items():
            slot = self.by_row.get(row, -1)
            if slot in self.held and _continues(tokens, self.held[slot].text):
                given[row] = slot
                taken.add(slot)
        lost = [row for row in rows if row not in given]
        for row in lost:
            free = (s for s in self.held if s not in taken and _continues(rows[row], self.held[s].text))
            slot = max(free, key=lambda s: len(self.held[s].text), default=-1)
            if slot >= 0:
                given[row] = slot
                taken.add(slot)
        fresh = list[int]()
        spare = [s for s in range(self.count) if s not in self.held] + [s for s in self.held if s not in taken]
        for row in rows:
            if row not in given:
                slot = spare.pop(0)
                given[row] = slot
                fresh.append(slot)
                self.held.pop(slot, None)
        self.by_row = given
        return given, fresh


def _continues(tokens: np.ndarray, text: np.ndarray) -> bool:
    n = len(text)
    return n <= len(tokens) and bool(tokens[n - 1] == text[-1]) and np.array_equal(tokens[:n], text)


class HistoryProposer:
    """The class behind `outrider.integrations.vllm.Proposer`: drafts by one of our drafters, with a length that the controller
    sets.

    Every draft is a point mass for vLLM's rejection sampler (it takes no distribution from such a class), which is lossless. Trees
    are not supported. A drafter that fails costs its drafts and nothing else.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.config = vllm_config
        self.settings = Settings.of(vllm_config.additional_config)
        self.longest = int(vllm_config.speculative_config.num_speculative_tokens)
        self.most = int(vllm_config.model_config.max_model_len)
        self.slots = Slots(int(vllm_config.scheduler_config.max_num_seqs) + 1)
        self.lengths: Lengths = lengths_of(self.settings, self.longest)
        self.knowledge = Knowledge()
        self._drafting: Drafting | None = None
        self._length = 0
        self._end: float | None = None

    # ------------------------------------------------------------------ what vLLM calls
    def load_model(self, target: Any, *args: Any, **kwargs: Any) -> None:
        """Make the drafter. target: vLLM's module of the target, of which nothing is read."""
        made = Drafting.load(self.settings.draft, self.longest, self.config)
        self.use(made.drafter, made.vocab_size, made)

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to warm up; data-parallel ranks call it."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts of 0 to `num_speculative_tokens` tokens for each row.

        sampled_token_ids: what the step emitted for each row; none for a prompt chunk. num_tokens_no_spec: [rows] tokens of each
        row, these included. token_ids_cpu: [rows, max_model_len] tokens.
        """
        began = perf_counter()
        rows = {
            i: token_ids_cpu[i, : int(num_tokens_no_spec[i])]
            for i, sampled in enumerate(sampled_token_ids)
            if len(sampled) and num_tokens_no_spec[i] > 0
        }
        given, fresh = self.slots.assign(rows)
        fresh += self._others(given)
        self._learn(sampled_token_ids, given, fresh, began)
        drafting = self._drafting
        out: list[list[int]] = [[] for _ in sampled_token_ids]
        if drafting is None or not rows:
            return out
        drafting.contained.release(fresh)
        length = self.lengths.next(len(rows))
        self._length = length
        views = [self._view(row, given[row], tokens) for row, tokens in rows.items()]
        budget = [self._room(view, length) for view in views]
        for row, draft in zip(rows, drafting.chains(views, budget), strict=True):
            out[row] = draft
            self.slots.held[given[row]].drafted = len(draft)
        self._end = perf_counter()
        return out

    # ------------------------------------------------------------------ ours
    def attach(self, runner: Any) -> None:
        """Our worker hands over vLLM's model runner, whose batch names the requests."""
        self.knowledge = Knowledge(runner, self._drafting.tokenizer if self._drafting else None)
        if self._drafting is not None:
            self._drafting.served()

    def use(self, drafter: Drafter, vocab_size: int, drafting: Drafting | None = None) -> None:
        """Draft with this drafter. vocab_size: of the target."""
        self._drafting = drafting or Drafting(Contained(drafter), vocab_size)
        drafter.bind(self.slots.count, self.most)

    def report(self) -> dict[str, Any]:
        """For our worker's report: plain numbers and sentences."""
        drafting = self._drafting
        contained = Contained(NoDraft()) if drafting is None else drafting.contained
        name = "none" if drafting is None else drafting.drafter.name
        return {"drafter": name, "faults": contained.faults, "notices": contained.notices, **note_of(self.lengths)}

    def _view(self, row: int, slot: int, tokens: np.ndarray) -> SequenceView:
        """The row as drafters see a sequence; its list of tokens grows in place."""
        held = self.slots.held.get(slot)
        if held is None:
            known = self.knowledge.of(row)
            prompt = len(tokens) - 1 if known.prompt is None else known.prompt
            view = SequenceView(slot, slot, tokens.tolist(), prompt, len(tokens) - 1, known.params, shares=False)
            self.slots.held[slot] = held = _Held(tokens.copy(), view, name=known.name)
        else:
            old = held.view
            old.tokens.extend(tokens[len(held.text) :].tolist())
            held.text = tokens.copy()
            held.view = SequenceView(slot, slot, old.tokens, old.prompt, len(old.tokens) - 1, old.params, shares=False)
        return held.view

    def _others(self, given: dict[int, int]) -> list[int]:
        """Slots whose row is another request that begins with the text of the one before, as the next turn of a conversation
        does."""
        changed = []
        for row, slot in given.items():
            held = self.slots.held.get(slot)
            if held is not None and held.name != self.knowledge.name(row):
                self.slots.held.pop(slot)
                changed.append(slot)
        return changed

    def _room(self, view: SequenceView, length: int) -> int:
        """Tokens that may be drafted: within the model's length, one place being the bonus token's."""
        own = view.params.draft_length
        return max(0, min(length, self.longest, self.most - len(view.tokens) - 1, length if own is None else own))

    def _learn(self, sampled: Sequence[Sequence[int]], given: dict[int, int], fresh: Sequence[int], now: float) -> None:
        """Tell the controller what the step that has just ended accepted, and how long it and our drafting took."""
        old = [(row, slot) for row, slot in given.items() if slot not in fresh]
        accepted = [len(sampled[row]) - 1 for row, _ in old]
        seconds = None if self._end is None or not old else now - self._end + self._spent
        prompts = len(old) < len(sampled)
        self.lengths.saw(SeenStep(len(old), self._length, self._length, prompts, seconds, accepted))

    @property
    def _spent(self) -> float:
        """Seconds of our latest drafting."""
        return 0.0 if self._drafting is None else self._drafting.seconds
