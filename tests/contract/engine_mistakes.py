"""Mistakes of an engine by value: each takes the right function and its arguments, and does nearly what it does.

`test_engine_mutants.py` puts them around the functions of the step, the cache, the scheduler, the sequence and the pipeline.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from outrider.noise import Noise
from outrider.types import Rows


# --------------------------------------------------------------------------------------- owners and paths of scored rows
def forget_ancestors(contexts, draft, views):
    owners, paths = contexts(draft, views)
    return owners, [path[-1:] for path in paths]


def forget_the_node_itself(contexts, draft, views):
    owners, paths = contexts(draft, views)
    return owners, [path[:-1] for path in paths]


def first_sequence_owns_all_nodes(contexts, draft, views):
    owners, paths = contexts(draft, views)
    return [*views, *views[:1] * (len(owners) - len(views))], paths


# -------------------------------------------------------------------------------------------------- a rule's verdict
def noise_one_position_late(rule, self, p, draft, noise, *allowance):
    return rule(self, p, draft, Noise(noise.seed, tuple(at + 1 for at in noise.position)), *allowance)


def next_token_of_the_first(rule, *arguments):
    verdict = rule(*arguments)
    return replace(verdict, next_token=verdict.next_token[:1] * len(verdict.next_token))


def correction_first(emit, sequence, tokens, *rest):
    return emit(sequence, [*tokens[-1:], *tokens[:-1]], *rest)


def prompt_chunks_take_verdicts(emit, parts, works, verified, *rest):
    """The n-th work reads the n-th verdict, whether the works before it had one or not."""
    verdict = verified.verdict
    numbers = [i % len(verdict.path) for i, work in enumerate(works) if work.scored]
    columns = {
        name: tuple(getattr(verdict, name)[i] for i in numbers)
        for name in ("path", "next_token", "judged", "risk", "spread", "bias")
    }
    return emit(parts, works, replace(verified, verdict=replace(verdict, **columns)), *rest)


# ------------------------------------------------------------------------------------------------- drafts and their rows
def trees_by_place_in_the_batch(take, draft, index):
    return take(draft, [i if i < len(draft.counts) else -1 for i in range(len(index))])


def parents_keep_their_numbers(take, draft, index):
    out = take(draft, index)
    nodes = [k for b in index if b >= 0 for k in range(draft.offsets[b], draft.offsets[b + 1])]
    return out if out is draft else replace(out, parent=tuple(min(draft.parent[k], len(nodes) - 1) for k in nodes))


def distributions_keep_their_order(take, draft, index):
    out = take(draft, index)
    return out if out.q is None else replace(out, q=replace(out.q, row=draft.q.row[: len(out.parent)]))


def positions_by_order(assemble, *arguments):
    rows = assemble(*arguments)
    flat = [s.cached + i for s in rows.segments for i in range(s.count)]
    return replace(rows, position=torch.tensor(flat))


def nodes_below_a_neighbours(assemble, *arguments):
    """Parents are counted from the first node of the step instead of the segment's."""
    rows, before, segments = assemble(*arguments), 0, []
    for s in rows.segments:
        room = max(s.count - 1, 0)
        parent = tuple(up if up < s.fed else min(up + before, room) for up in s.parent)
        segments.append(replace(s, parent=parent))
        before += len(s.parent)
    return replace(rows, segments=tuple(segments))


def children_of_the_anchor(assemble, *arguments):
    rows = assemble(*arguments)
    segments = tuple(replace(s, parent=(s.fed - 1,) * len(s.parent)) for s in rows.segments)
    position = [s.cached + min(i, s.fed) for s in rows.segments for i in range(s.count)]
    return replace(rows, segments=segments, position=torch.tensor(position))


def scored_one_row_early(assemble, *arguments):
    rows = assemble(*arguments)
    early = [s.first + max(s.fed - 2, 0) for s in rows.segments if s.scored]
    return replace(rows, scored=torch.cat([torch.tensor(early, dtype=torch.int64), rows.scored[len(early) :]]))


# ------------------------------------------------------------------------------------------------------------- the cache
def paths_by_numbers_of_the_draft(commit, kv, rows: Rows, paths):
    before, shifted = 0, []
    for s, path in zip(rows.segments, paths, strict=True):
        shifted.append([before + i for i in path])
        before += len(s.parent)
    commit(kv, rows, shifted)


def paths_fall_to_prompt_chunks(commit, kv, rows: Rows, paths):
    scored = [path for s, path in zip(rows.segments, paths, strict=True) if s.scored]
    commit(kv, rows, [*scored, *[[]] * (len(rows.segments) - len(scored))])


def paths_stay_where_they_were_drafted(commit, kv, rows: Rows, paths):
    commit(kv, rows, [range(len(path)) for path in paths])


def only_keys_move(commit, kv, rows: Rows, paths):
    values = kv.v.clone()
    commit(kv, rows, paths)
    kv.v.copy_(values)


def rejected_rows_stay(commit, kv, rows: Rows, paths):
    commit(kv, rows, paths)
    for s in rows.segments:
        kv.length[s.slot] = s.cached + s.count


def paths_start_at_the_anchor(commit, kv, rows: Rows, paths):
    commit(kv, rows, [path if list(path) == list(range(len(path))) else [i - 1 for i in path] for path in paths])


def length_of_a_neighbour(commit, kv, rows: Rows, paths):
    before = list(kv.length)
    commit(kv, rows, paths)
    length = [kv.length[s.slot] for s in rows.segments]
    kv.length[:] = before
    kv.length[0] = length[-1]


def nothing(right, *arguments):
    """The call is left out."""


# ------------------------------------------------------------------------------------------- scheduler, ends and sums
def all_chunks_are_judged(plan, scheduler):
    return [replace(work, scored=True) for work in plan(scheduler)]


def finished_sequences_stay(drop, scheduler, sequence, release):
    if sequence.finish_reason is None:
        drop(scheduler, sequence, release)


def dropped_sequences_keep_their_slot(drop, scheduler, sequence, release):
    before = sequence.slot, sequence.cached
    drop(scheduler, sequence, release)
    sequence.slot, sequence.cached = before


def proposed_count_as_accepted(add, counts, proposed, accepted, *rest):
    add(counts, proposed, proposed, *rest)


def drafts_behind_the_end_count(add, counts, proposed, accepted, judged, risk, spread, bias, kept=None):
    add(counts, proposed, accepted, judged, risk, spread, bias)


def tokens_behind_the_end_count(emit, sequence, tokens, *rest):
    event = emit(sequence, tokens, *rest)
    sequence.counts.emitted += len(tokens) - len(event.tokens)
    return event


# ------------------------------------------------------------------------------------------ bad drafts are sanitized
def large_tokens_pass(sanitize, draft, vocab_size):
    return sanitize(draft, vocab_size) if min(draft.tokens, default=-1) < 0 else (draft, 0)


def negative_tokens_pass(sanitize, draft, vocab_size):
    return sanitize(draft, vocab_size) if max(draft.tokens, default=vocab_size) >= vocab_size else (draft, 0)


def nan_passes(sanitize, draft, vocab_size):
    return (draft, 0) if draft.q is not None and bool(draft.q.probs.isnan().any()) else sanitize(draft, vocab_size)


# --------------------------------------------------------------------------------------------- the logits' pipeline
def parameters_of_the_first(pipeline, self, logits, sequences, paths):
    return pipeline(self, logits, [replace(s, params=sequences[0].params) for s in sequences], paths)


def prompts_are_output(follow, history, tokens, prompt):
    follow(history, tokens, 0)


def drafted_tokens_are_not_counted(along, history, path):
    known = along(history, ())[1].copy()
    ids, counts = along(history, path)
    return ids, np.concatenate([known, counts[len(known) :]])
