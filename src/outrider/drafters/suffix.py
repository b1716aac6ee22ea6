"""Suffix decoding: drafts what most often followed the text's end before (Oliaro et al. 2024, arXiv 2411.04975). No model.

Prompt lookup copies from the latest occurrence. A suffix tree counts all of them: it knows how sure a continuation is, how many
tokens of it are worth a row, and which of several lengths of the match to trust.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from outrider.drafters.tree.forest import chains
from outrider.errors import ConfigError
from outrider.types import Draft, Evidence, SequenceView

MATCH = 24
"""Longest end of the text that is looked for."""
LEAST = 0.1
"""Drafting stops where the counted probability of the whole draft falls below this (the paper's value)."""
MEMORY = 1 << 20
"""Tokens of finished texts that a shared drafter remembers, in two halves: the older one is dropped when the newer one is full."""
READ = 256
"""Most tokens of finished texts that are read in one step: what others wrote never holds up a step."""


class _Node:
    """A substring that occurred at least twice. children: next token -> its node, or the only place where it stands there.

    count: occurrences. total: those with a token behind them. best, most: the token most often behind it, and how often; of
    several the latest. place, before: of the longest substrings, which have no children, where the last two of them end.
    """

    __slots__ = ("before", "best", "children", "count", "most", "place", "total")

    def __init__(self, count: int) -> None:
        self.children: dict[int, _Node | int] = {}
        self.count = count
        self.total = self.most = 0
        self.best = self.place = self.before = -1

    def seen(self, token: int, times: int) -> None:
        """One more occurrence is followed by `token`, which now makes `times` of them."""
        self.total += 1
        if times >= self.most:
            self.best, self.most = token, times


class SuffixTree:
    """All substrings of a growing text of at most `match` + 1 tokens, with counts.

    A substring that occurred once is no node, only its place in the text: reading a token costs one step for each end of the text
    that occurred before, and memory for each *repeated* substring. The text itself stays with the caller. A negative token stands
    between two texts.
    """

    def __init__(self, match: int = MATCH) -> None:
        self.match = match
        self.root = _Node(0)
        self.ends = [self.root]  # ends[n]: the node of the last n tokens; only ends that occurred at least twice
        self.size = 0  # tokens read
        self.last = -1

    def follows(self, text: Sequence[int]) -> bool:
        """Whether `text` may continue the text that was read."""
        return self.size <= len(text) and (self.size == 0 or text[self.size - 1] == self.last)

    def extend(self, text: Sequence[int], end: int | None = None) -> None:
        """Read the tokens of `text` up to `end` that are new."""
        for at in range(self.size, len(text) if end is None else end):
            self.size = at + 1
            self._read(text, at)
        self.last = text[self.size - 1] if self.size else -1

    def _read(self, text: Sequence[int], at: int) -> None:
        token, ends = text[at], [self.root]
        if token < 0:  # between two texts: nothing reaches across
            self.ends = ends
            return
        for length, node in enumerate(self.ends, start=1):
            child = node.children.get(token)
            if child is None:
                node.children[token] = at
                node.seen(token, 1)
                continue
            if isinstance(child, int):  # the second time: it becomes a node, with what followed the first time
                place, child = child, _Node(1)
                if length <= self.match and text[place + 1] >= 0:
                    child.children[text[place + 1]] = place + 1
                    child.seen(text[place + 1], 1)
                elif length > self.match:
                    child.place = place
                node.children[token] = child
            child.count += 1
            node.seen(token, child.count)
            if length <= self.match:
                ends.append(child)
            else:
                child.place, child.before = at, child.place
        self.ends = ends

    def matches(self, text: Sequence[int], tokens: Sequence[int]) -> list[_Node | int]:
        """As `ends`, for the end of other tokens than `text`, that was read; here ends that occurred once are found, too."""
        found: list[_Node | int] = [self.root]
        for n in range(1, min(self.match, len(tokens)) + 1):
            node: _Node | int | None = self.root
            for token in tokens[len(tokens) - n :]:
                if isinstance(node, _Node):
                    node = node.children.get(token)
                elif node is not None:
                    node = node + 1 if node + 1 < self.size and text[node + 1] == token else None
            if node is None:
                break
            found.append(node)
        return found

    def best(self, text: Sequence[int], ends: Sequence[_Node | int], limit: int) -> tuple[float, list[int]]:
        """The draft of the best of `ends`, at most `limit` tokens, and how many of its tokens the counts expect to be accepted.

        A match of n tokens is trusted for n tokens. A shorter match that occurred no more often than a longer one says the same.
        """
        best, draft, total = 0.0, list[int](), 0
        for n in range(len(ends) - 1, 0, -1):
            end = ends[n]
            times = end.total if isinstance(end, _Node) else 1
            if times == total:
                continue
            total = times
            score, found = _follow(text, self.size, end, min(limit, n))
            if score > best + 1e-9:  # of equals the longest match
                best, draft = score, found
        return best, draft


def _follow(text: Sequence[int], size: int, node: _Node | int, limit: int) -> tuple[float, list[int]]:
    """The most frequent continuation of a node in the `size` tokens that were read, and the sum of its tokens' probabilities."""
    chance, score, draft = 1.0, 0.0, list[int]()
    while len(draft) < limit:
        if isinstance(node, _Node) and node.place >= 0:
            node = node.place if node.place + 1 < size else node.before  # the very end has nothing behind it
        if isinstance(node, _Node):
            if not node.total:
                break
            token, chance = node.best, chance * node.most / node.total
            node = node.children[token]
        else:
            if node + 1 >= size or text[node + 1] < 0:
                break
            node += 1
            token = text[node]
        if chance < LEAST:
            break
        draft.append(token)
        score += chance
    return score, draft


class _Memory:
    """Texts that have ended, as two trees: when the newer one holds `tokens` / 2, it becomes the older one, and that is dropped."""

    def __init__(self, tokens: int) -> None:
        self.half = max(tokens // 2, 1)
        self.waiting: deque[list[int]] = deque()
        self._tokens = 0  # of the texts that wait
        self.trees = [(SuffixTree(), list[int]())]

    def add(self, text: list[int]) -> None:
        """A text that has ended; it waits to be read, and is not remembered where as many tokens as fit wait already."""
        text = text[-self.half :]
        if self._tokens + len(text) <= self.half:
            self.waiting.append(text)
            self._tokens += len(text)

    def read(self, most: int = READ) -> None:
        """Read up to `most` of the tokens that wait."""
        while most > 0 and (self.waiting or self._behind):
            tree, text = self.trees[0]
            if not self._behind:
                if tree.size >= self.half:
                    self.trees = [(SuffixTree(), []), *self.trees[:1]]
                    tree, text = self.trees[0]
                text += self.waiting.popleft()
                self._tokens -= len(text) - tree.size
                text.append(-1)
            end = min(len(text), tree.size + most)
            most -= end - tree.size
            tree.extend(text, end)

    @property
    def _behind(self) -> bool:
        tree, text = self.trees[0]
        return tree.size < len(text)

    def best(self, tokens: Sequence[int], limit: int) -> tuple[float, list[int]]:
        """The best draft of what was remembered."""
        found = (tree.best(text, tree.matches(text, tokens), limit) for tree, text in self.trees)
        return max(found, key=lambda one: one[0])


class Suffix:
    """Drafts the most frequent continuation of the text's end, as point masses; nothing where the end is new.

    depth: most tokens a draft has, >= 1. shared: tokens of finished texts of all requests to remember, 0 for none. They are used
    for requests whose text cannot depend on drafts for the same seed: those without a seed of their own, and greedy ones.
    """

    name = "suffix"
    layers: tuple[int, ...] = ()
    trees = False

    def __init__(self, depth: int, *, shared: int = 0) -> None:
        if depth < 1:
            raise ConfigError(f"the suffix drafter needs a length >= 1, got {depth}; use 'none' to draft nothing")
        if shared < 0:
            raise ConfigError(f"a memory of {shared} tokens: it must be >= 0")
        self.max_depth = self.max_nodes = depth
        self._trees: dict[int, tuple[SuffixTree, SequenceView]] = {}  # by slot: the tree, and what it has read
        self._memory = _Memory(shared) if shared else None

    def bind(self, slots: int, length: int) -> None:
        """Nothing to allocate: a tree grows with its text."""

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """One chain per sequence. With budget 0 nothing is read; the next positive budget reads all new tokens."""
        if self._memory is not None:
            self._memory.read()
        found = [
            self._continue(v, min(b, self.max_depth)) if b > 0 else ()
            for v, b in zip(evidence.sequences, budget, strict=True)
        ]
        return chains(found, evidence.scores.logits.device)

    def _continue(self, view: SequenceView, depth: int) -> list[int]:
        tree = self._trees[view.slot][0] if view.slot in self._trees else SuffixTree()
        if not tree.follows(view.tokens):
            tree = SuffixTree()
        tree.extend(view.tokens)
        self._trees[view.slot] = tree, view
        score, draft = tree.best(view.tokens, tree.ends, depth)
        if self._memory is not None and (view.params.seed is None or view.params.greedy):
            other, known = self._memory.best(view.tokens, depth)
            draft = known if other > score else draft
        return draft

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots; a shared drafter keeps their texts."""
        for slot in slots:
            tree, view = self._trees.pop(slot, (None, None))
            if self._memory is not None and tree is not None and view is not None:
                self._memory.add(view.tokens[view.prompt : tree.size])
