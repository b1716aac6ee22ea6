"""Drafts from what was seen before: the suffix tree, and the target's recycled candidates."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.drafters.recycle import KEPT, Recycle
from outrider.drafters.suffix import LEAST, Memory, Suffix, SuffixTree
from outrider.drafters.tree.shapes import levels
from outrider.errors import ConfigError
from outrider.models.toy import TinyLM
from outrider.params import SamplingParams
from outrider.protocols import Drafter
from outrider.verify import SpeculativeSampling
from tests.drafters.drafting import chain, evidence, view
from tests.work import lines_run

V = 50


def by_counting(text: list[int], match: int, limit: int) -> tuple[float, list[int]]:
    """The definition, by scanning: for every length of the text's end the most frequent continuation of its occurrences."""
    best, known = (0.0, list[int]()), 0
    for n in range(min(match, len(text)), 0, -1):
        places = [at + n for at in range(len(text) - n) if text[at : at + n] == text[-n:]]
        if len(places) == known:  # as often as a longer end: the same occurrences
            continue
        known, chance, score, draft = len(places), 1.0, 0.0, list[int]()
        while len(draft) < min(limit, n) and (places := [at for at in places if at < len(text)]):
            if n + len(draft) > match:  # deeper than the tree: the latest occurrence alone
                places = places[-1:]
            counts = Counter(text[at] for at in places)
            latest = {text[at]: at for at in places}
            token = max(counts, key=lambda t: (counts[t], latest[t]))
            chance *= counts[token] / len(places)
            if chance < LEAST:
                break
            draft.append(token)
            score += chance
            places = [at + 1 for at in places if text[at] == token]
        if score > best[0] + 1e-9:
            best = score, draft
    return best


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    match=st.sampled_from([1, 2, 5, 24]),
)
@settings(max_examples=150)
def test_the_tree_counts_what_a_scan_counts(text: list[int], cuts: list[int], match: int) -> None:
    tree = SuffixTree(match)
    for cut in sorted(cuts):
        tree.extend(text[:cut])
    tree.extend(text)
    score, draft = tree.best(text, tree.ends, 6)
    expected, known = by_counting(text, match, 6)
    assert draft == known
    assert score == pytest.approx(expected)


def test_a_frequent_continuation_beats_the_latest_one() -> None:
    text = [1, 2, 3, 9, 1, 2, 3, 9, 1, 2, 3, 9, 1, 2, 4, 8, 1, 2]
    drafter = Suffix(2)
    assert chain(drafter.draft(evidence([view(text)], V), [2])) == [3, 9]
    assert chain(NGram(2).draft(evidence([view(text)], V), [2])) == [4, 8]


def test_a_match_is_trusted_for_its_own_length() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1]
    assert chain(Suffix(5).draft(evidence([view(text)], V), [5])) == [2]
    assert chain(Suffix(5).draft(evidence([view([*text, 2, 3])], V), [5])) == [4, 5, 6]


def test_memory_is_for_requests_without_a_seed() -> None:
    """What others wrote is used where no text can depend on it, and forgotten text is not."""
    drafter = Suffix(4, shared=200)
    ended = view([7, 1, 2, 3, 4, 5, 6], prompt=1)
    drafter.draft(evidence([ended], V), [4])
    drafter.release([0])
    for how, found in ({}, [3, 4]), ({"temperature": 0.0, "seed": 3}, [3, 4]), ({"seed": 3}, []):
        request = replace(view([20, 1, 2]), params=SamplingParams(**how))
        assert chain(drafter.draft(evidence([request], V), [4])) == found, how
        drafter.release([0])
    assert chain(Suffix(4).draft(evidence([view([20, 1, 2])], V), [4])) == []
    assert chain(drafter.draft(evidence([view([30, 7, 1])], V), [4])) != [2, 3]  # a prompt is nobody's output
    drafter.release([0])
    for n in range(40):  # older texts make room
        drafter.draft(evidence([view([9, *range(10 + n % 7, 30 + n % 7)], prompt=1)], V), [4])
        drafter.release([0])
    for _ in range(20):
        drafter.draft(evidence([view([0])], V), [0])
    assert chain(drafter.draft(evidence([view([40, 1, 2])], V), [4])) == []


def test_texts_that_wait_to_be_remembered_have_a_bound() -> None:
    """Many texts end between two steps: no more of them waits than the memory holds, and the latest is there."""
    memory = Memory(200)
    for n in range(50):
        memory.add([*range(100 * n, 100 * n + 30)])
        assert 0 < memory.queued == sum(map(len, memory.waiting)) <= 200
    memory.add([*range(6000, 6500)])
    assert len(memory.waiting[-1]) == 100 and memory.queued <= 200
    memory.read(1000)
    assert memory.queued == 0 and not memory.waiting
    assert memory.best([7, 6450, 6451], 3)[1] == [6452, 6453]
    assert memory.best([7, 100, 101], 3)[1] == []


@pytest.mark.parametrize(
    "text", [lambda n: [(i * i) % 977 for i in range(n)], lambda n: [3] * n], ids=["squares", "one token"]
)
def test_a_long_text_is_read_in_time_proportional_to_its_length(text) -> None:
    """Four times the tokens in one go: a reading that looks back at every token would take 16 times the work."""
    work = [
        lines_run(lambda n=n: Suffix(8).draft(evidence([view(text(n))], 1000), [8]), "drafters/suffix")
        for n in (1500, 6000)
    ]
    assert 3 * work[0] < work[1] < 8 * work[0]


def test_recycled_candidates_are_the_targets_own() -> None:
    """Every child is among the likeliest tokens that some scored row gave behind its parent's token, or was read there."""
    target = TinyLM(V, 16, 1, seed=3, sharp=2.0)
    said: dict[int, list[set[int]]] = {}

    class Watched(Recycle):
        def _learn(self, evidence) -> None:
            super()._learn(evidence)
            tokens = evidence.rows.token[evidence.rows.scored].tolist()
            for token, row in zip(tokens, evidence.scores.logits, strict=True):
                said.setdefault(token, []).append(set(row.topk(KEPT).indices.tolist()))

        def draft(self, evidence, budget):
            out = super().draft(evidence, budget)
            for k, up in enumerate(out.parent):
                above = out.tokens[up] if up >= 0 else evidence.sequences[0].tokens[-1]
                text = evidence.sequences[0].tokens
                read = {b for a, b in pairwise(text) if a == above}
                assert any(out.tokens[k] in row for row in said.get(above, [])) or out.tokens[k] in read
            return out

    drafter = Watched(levels((3, 2)))
    engine = Engine(target, drafter, SpeculativeSampling(), Fixed(2), slots=1)
    out = engine.generate([[1, 2, 3, 1, 2]], SamplingParams(max_tokens=60, seed=1, temperature=0.7, ignore_eos=True))[0]
    assert len(out.outputs[0].token_ids) == 60
    assert engine.counts.proposed > 60


@pytest.mark.parametrize("kind", ["suffix", "shared", "recycle", "tree"])
def test_greedy_text_is_the_targets_own(kind: str) -> None:
    target = TinyLM(V, 16, 1, seed=3, sharp=2.0)
    drafters: dict[str, Drafter] = {
        "suffix": Suffix(5),
        "shared": Suffix(5, shared=100),
        "recycle": Recycle(levels((1,) * 4)),
        "tree": Recycle(levels((3, 2, 1))),
    }
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    prompts = [[1, 2, 3, 1, 2], [4], [5, 5, 5, 5], [1, 2, 3, 1, 2]]
    engines = [Engine(target, d, SpeculativeSampling(), Fixed(5), slots=2) for d in (drafters[kind], NoDraft())]
    texts = [[r.outputs[0].token_ids for r in engine.generate(prompts, params)] for engine in engines]
    assert texts[0] == texts[1]
    assert engines[0].counts.accepted > 0


def test_bad_options() -> None:
    for wrong in (lambda: Suffix(0), lambda: Suffix(3, shared=-1), lambda: Recycle(levels((KEPT + 1,)))):
        with pytest.raises(ConfigError):
            wrong()
