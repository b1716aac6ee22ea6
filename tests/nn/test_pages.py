"""Pages of the KV cache: no page is lost or held twice, and no sequence reads what another one wrote after a different text."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outrider.errors import CapacityError
from outrider.nn.kv import PAGE, PagedKV, page_limit
from outrider.types import Draft, Rows

CPU = torch.device("cpu")
SLOTS, CAPACITY, SIZE = 4, 22, 4


def paged(limit: int | None = None, page: int = SIZE) -> PagedKV:
    return PagedKV(1, SLOTS, 1, CAPACITY, 1, torch.float64, CPU, page=page, limit=limit)


def write(kv: PagedKV, slot: int, start: int, tokens: list[int], owner: int) -> None:
    """Every place says its token (key) and in whose tree it was written (value)."""
    values = torch.tensor(tokens, dtype=torch.float64)[:, None, None]
    kv.write(0, slot, start, values, torch.full_like(values, owner))


class Schedules(RuleBasedStateMachine):
    """Sequences come, grow by prompt pieces and drafted paths, share, fork, are cut, break, are aborted or sent away."""

    @initialize(pages=st.integers(6, 24))
    def build(self, pages: int) -> None:
        self.kv = paged(pages)
        self.text: dict[int, list[int]] = {}  # slot -> what its sequence has to be in the cache
        self.wants: dict[int, list[int]] = {}  # slot -> all that it will be
        self.owner: dict[int, int] = {}

    def room(self, slot: int, tokens: int) -> bool:
        """Room for so many tokens of a slot, if need be by sending away the youngest others."""
        while self.kv.lacking(slot, tokens) > self.kv.spare:
            others = [s for s in self.text if s != slot]
            if not others:
                return False
            self.leave(others[-1])
        return True

    def leave(self, slot: int) -> None:
        self.kv.release([slot])
        for held in (self.text, self.wants, self.owner):
            del held[slot]

    @precondition(lambda self: len(self.text) < SLOTS)
    @rule(
        wants=st.lists(st.integers(0, 1), min_size=1, max_size=16),
        owner=st.integers(0, 1),
        step=st.sampled_from([1, 8]),
    )
    def admit(self, wants: list[int], owner: int, step: int) -> None:
        slot = min(set(range(SLOTS)) - set(self.text))
        found = self.kv.share(slot, wants, owner, step)
        assert found < len(wants) and found % step == 0
        self.text[slot], self.wants[slot], self.owner[slot] = wants[:found], wants, owner

    @precondition(lambda self: self.text)
    @rule(data=st.data(), piece=st.integers(1, 6), nodes=st.integers(0, 3), published=st.booleans())
    def feed(self, data: st.DataObject, piece: int, nodes: int, published: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(self.text)))
        text, owner = self.text[slot], self.owner[slot]
        new = self.wants[slot][len(text) : len(text) + piece] or [1]
        drafted = data.draw(st.lists(st.integers(0, 1), min_size=nodes, max_size=nodes))
        parents = [data.draw(st.integers(-1, i - 1)) for i in range(nodes)]
        end = len(text) + len(new) + nodes
        if end > CAPACITY or not self.room(slot, end):
            return
        draft = Draft(torch.tensor(drafted, dtype=torch.int64), tuple(parents), (nodes,))
        rows = Rows.assemble([slot], [new], [len(text)], draft)
        self.kv.reserve(rows)
        write(self.kv, slot, len(text), new + drafted, owner)
        path: list[int] = []
        while children := [i for i, up in enumerate(parents) if up == (path[-1] if path else -1)]:
            path.append(data.draw(st.sampled_from(children)))
        self.kv.commit(rows, [path])
        self.text[slot] = text + new + [drafted[i] for i in path]
        if published:
            self.kv.publish(slot, self.text[slot] + [1], owner)

    @precondition(lambda self: self.text)
    @rule(data=st.data())
    def share_more(self, data: st.DataObject) -> None:
        """Others have published meanwhile what this one has still to be fed."""
        slot = data.draw(st.sampled_from(sorted(self.text)))
        if len(self.text[slot]) < len(self.wants[slot]) and self.text[slot] == self.wants[slot][: len(self.text[slot])]:
            found = self.kv.share(slot, self.wants[slot], self.owner[slot])
            self.text[slot] = self.wants[slot][:found]

    @precondition(lambda self: self.text)
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.text)))
        kept = data.draw(st.integers(0, len(self.text[slot])))
        self.kv.truncate(slot, kept)
        del self.text[slot][kept:]

    @precondition(lambda self: 0 < len(self.text) < SLOTS)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """Another sequence begins with what one holds, up to any token."""
        slot, goal = data.draw(st.sampled_from(sorted(self.text))), min(set(range(SLOTS)) - set(self.text))
        kept = data.draw(st.integers(0, len(self.text[slot])))
        self.kv.fork(slot, goal, kept)
        self.text[goal], self.wants[goal], self.owner[goal] = self.text[slot][:kept], self.wants[slot], self.owner[slot]

    @precondition(lambda self: self.text)
    @rule(data=st.data(), broken=st.booleans())
    def abort(self, data: st.DataObject, broken: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(self.text)))
        if broken:
            pages = self.kv.pages.of(slot)
            self.kv.erase(slot)
            assert not any(page in self.kv.prefixes for page in pages)
        self.leave(slot)

    @invariant()
    def reads_its_own_text(self) -> None:
        for slot, text in getattr(self, "text", {}).items():
            keys, values = self.kv.entries(slot, len(text))
            assert keys.flatten().tolist() == text and self.kv.length[slot] == len(text)
            assert set(values.flatten().tolist()) <= {self.owner[slot]}

    @invariant()
    def leaks_no_page(self) -> None:
        if not hasattr(self, "kv"):
            return
        pages, prefixes = self.kv.pages, self.kv.prefixes
        held = Counter(page for slot in range(SLOTS) for page in pages.of(slot))
        assert [held[page] for page in range(pages.count)] == pages.uses
        assert len(held) + prefixes.idle + pages.free == pages.count
        assert prefixes.idle == sum(page in prefixes and not held[page] for page in range(pages.count))
        assert not any(pages.held[slot] for slot in range(SLOTS) if slot not in self.text)

    def teardown(self) -> None:
        for slot in list(getattr(self, "text", {})):
            self.leave(slot)
        if hasattr(self, "kv"):
            while self.kv.prefixes.idle:
                page = self.kv.prefixes.spare()
                assert page is not None
                self.kv.pages.give_back(page)
            assert self.kv.pages.free == self.kv.pages.count and not len(self.kv.prefixes)


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_schedules() -> None:
    case = type("Case", (Schedules.TestCase,), {"settings": settings(max_examples=10_000, stateful_step_count=30)})
    case("runTest").runTest()


def test_a_sequence_lies_in_one_piece_while_it_can() -> None:
    """Slots that grow in turns do not mix; one that starts between two finished ones still gets neighbours."""
    kv = PagedKV(1, 4, 1, 40, 1, torch.float32, CPU, page=4)
    for end in range(4, 41, 4):
        for slot in range(4):
            kv.make_room(slot, end)
    assert all(isinstance(kv.places(slot, 0, 40), slice) for slot in range(4))
    kv.release([1, 3])
    kv.make_room(3, 40)
    assert isinstance(kv.places(3, 0, 40), slice)


def test_the_longest_unused_page_goes_first_and_the_last_of_a_text_before_its_first() -> None:
    kv = PagedKV(1, 2, 1, 12, 1, torch.float64, CPU, page=4, limit=5)

    def run(text: list[int]) -> None:
        rows = Rows.assemble([0], [text], [0], Draft.empty(1))
        kv.reserve(rows)
        write(kv, 0, 0, text, 0)
        kv.commit(rows, [[]])
        kv.publish(0, text)
        kv.release([0])

    old, new = [1] * 9, [2] * 8
    run(old)
    run(new)  # four full pages are known, one is free
    kv.make_room(0, 8)  # needs one of them, and gives up FEW at most: none of the newest while there are others
    found = [kv.prefixes.find(None, text) for text in (old, new)]
    assert len(found[0]) <= 1 or found[1]
    kv.release([0])
    assert kv.spare == 5


def test_a_limit_is_a_promise() -> None:
    assert page_limit(8, 10 * PAGE, 1000, CPU, memory=12 * PAGE * 1000) == 12
    with pytest.raises(CapacityError, match="a sequence of 640 tokens needs .* lower max_length"):
        page_limit(8, 10 * PAGE, 1000, CPU, memory=9 * PAGE * 1000)
    with pytest.raises(CapacityError, match="lower kv_memory"):
        page_limit(8, 1 << 30, 1 << 20, CPU, memory=1 << 60)
    kv = paged(limit=3)
    kv.make_room(0, 12)
    with pytest.raises(CapacityError, match="all 3 pages"):
        kv.make_room(1, 1)
