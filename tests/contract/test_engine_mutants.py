"""EX-11 for the engine: mistakes planted in the step, the scheduler, the sequence, the cache and the pipeline are each killed.

A mistake stands around a function (`engine_mistakes`), or is an edit of its syntax tree where no value shows it. The checks
that kill them are those of `engine_checks`. `tests/law/test_mutants.py` does the same for the rules and the noise.
"""

from __future__ import annotations

import pytest

from outrider.errors import OutriderError
from tests.contract import engine_mistakes as wrong
from tests.contract.asked import SAMPLING
from tests.contract.engine_checks import CHECKS, bad_drafts, caches, churn, ends, itself, plain, settings, strings
from tests.mutants import Around, Edit, Place

# ------------------------------------------------------------------------------------- where the mistakes are planted
CONTEXTS = Place("outrider.engine.rows", "row_contexts")
EMIT = Place("outrider.engine.emit", "emit")
BUDGET = Place("outrider.engine.budget", "_within")
SANITIZE = Place("outrider.engine.sanitize", "sanitize_draft")
ADMIT = Place("outrider.engine.scheduler", "Scheduler.admit")
PLAN = Place("outrider.engine.scheduler", "Scheduler.plan")
DROP = Place("outrider.engine.scheduler", "Scheduler.drop")
APPEND = Place("outrider.engine.sequence", "Sequence.emit")
ADVANCE = Place("outrider.engine.sequence", "Sequence._advance")
RULE = Place("outrider.verify.match", "Match.__call__")
TAKE = Place("outrider.types", "Draft.take")
ASSEMBLE = Place("outrider.types", "Rows.assemble")
ADD = Place("outrider.records", "Counts.add")
COMMIT = Place("outrider.nn.kv", "PagedKV.commit")
RELEASE = Place("outrider.nn.kv", "PagedKV.release")
PIPELINE = Place("outrider.sampling.pipeline", "LogitsPipeline.__call__")
LIMITS = Place("outrider.sampling.pipeline", "LogitsPipeline._edit")
FOLLOW = Place("outrider.sampling.history", "History.follow")
ALONG = Place("outrider.sampling.history", "History.along")

MUTANTS = [  # name, mistake, the check that kills it
    ("row contexts: a node forgets its ancestors", Around(CONTEXTS, wrong.forget_ancestors), strings),
    ("row contexts: a node counts itself as unseen", Around(CONTEXTS, wrong.forget_the_node_itself), strings),
    ("row contexts: a node borrows the first sequence's parameters", Around(CONTEXTS, wrong.first_sequence_owns_all_nodes), settings),
    ("paths: numbers of the draft instead of the segment", Around(COMMIT, wrong.paths_by_numbers_of_the_draft), strings),
    ("paths: a prompt chunk eats a verdict", Around(COMMIT, wrong.paths_fall_to_prompt_chunks), strings),
    ("noise: the drafter's is one position late", Around(RULE, wrong.noise_one_position_late), strings),
    ("verdict: order of accepted and corrected", Around(APPEND, wrong.correction_first), strings),
    ("verdict: a neighbour's next token", Around(RULE, wrong.next_token_of_the_first), strings),
    ("verdict: prompt chunks shift the sequences", Around(EMIT, wrong.prompt_chunks_take_verdicts), strings),
    ("pending: by place in the batch instead of by sequence", Around(TAKE, wrong.trees_by_place_in_the_batch), itself),
    ("budget: one beyond the limit", Edit(BUDGET, "S.room - 1", "S.room"), ends),
    ("release: the cache keeps its length", Around(RELEASE, wrong.nothing), churn),
    ("counts: proposed instead of accepted", Around(ADD, wrong.proposed_count_as_accepted), strings),
    ("counts: drafts behind the end count as accepted", Around(ADD, wrong.drafts_behind_the_end_count), strings),
    ("counts: tokens behind the end", Around(APPEND, wrong.tokens_behind_the_end_count), strings),
    ("end: finished sequences stay", Around(DROP, wrong.finished_sequences_stay), strings),
    ("sanitize: tokens outside the vocabulary pass", Around(SANITIZE, wrong.large_tokens_pass), bad_drafts),
    ("sanitize: negative tokens pass", Around(SANITIZE, wrong.negative_tokens_pass), bad_drafts),
    ("sanitize: distributions of NaN pass", Around(SANITIZE, wrong.nan_passes), bad_drafts),
    ("scheduler: a slot handed out and kept", Edit(ADMIT, "F.pop()", "F[-1]"), churn),
    ("scheduler: a slot lost for ever", Edit(DROP, "F.append(S.slot)", "pass"), churn),
    ("scheduler: every prompt chunk is judged", Around(PLAN, wrong.all_chunks_are_judged), strings),
    ("scheduler: a dropped sequence keeps its slot", Around(DROP, wrong.dropped_sequences_keep_their_slot), churn),
    ("sequence: goes on after its end", Edit(APPEND, "if R is not None: break", "pass"), ends),
    ("sequence: one token too many", Edit(ADVANCE, "S.room <= 0", "S.room < 0"), ends),
    ("rows: positions by order instead of depth", Around(ASSEMBLE, wrong.positions_by_order), caches),
    ("rows: a node below its neighbour's nodes", Around(ASSEMBLE, wrong.nodes_below_a_neighbours), strings),
    ("rows: a child hangs on the anchor", Around(ASSEMBLE, wrong.children_of_the_anchor), strings),
    ("rows: scored one row early", Around(ASSEMBLE, wrong.scored_one_row_early), strings),
    ("take: parents of the old numbering", Around(TAKE, wrong.parents_keep_their_numbers), churn),
    ("take: distributions in the old order", Around(TAKE, wrong.distributions_keep_their_order), itself),
    ("cache: the accepted path stays where it was drafted", Around(COMMIT, wrong.paths_stay_where_they_were_drafted), caches),
    ("cache: only the keys move", Around(COMMIT, wrong.only_keys_move), strings),
    ("cache: rejected rows stay", Around(COMMIT, wrong.rejected_rows_stay), strings),
    ("cache: every path starts at the anchor's row", Around(COMMIT, wrong.paths_start_at_the_anchor), caches),
    ("cache: length of a neighbour", Around(COMMIT, wrong.length_of_a_neighbour), strings),
    ("pipeline: temperature of the first row for all", Around(PIPELINE, wrong.parameters_of_the_first), settings),
    ("pipeline: the minimum length ignores the path", Edit(LIMITS, "A + len(P) < M.min_tokens", "A < M.min_tokens"), strings),
    ("history: the prompt counts as output", Around(FOLLOW, wrong.prompts_are_output), strings),
    ("history: of the slot's last owner", Edit(FOLLOW, "T is O and P == Q and L", "L"), strings),
    ("history: drafted tokens are not counted", Around(ALONG, wrong.drafted_tokens_are_not_counted), strings),
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_engine_without_a_mistake_passes(check) -> None:
    check()


def test_the_table_is_large() -> None:
    assert len(MUTANTS) >= 30
    assert len({name for name, *_ in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[0])
def test_mutant_is_killed(mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    _, mistake, check = mutant
    for sampling in SAMPLING:
        plain(sampling)
    mistake.plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError, RuntimeError, OutriderError)):
        check()
