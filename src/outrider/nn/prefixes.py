"""Full pages by the tokens in them and before them, so that a sequence may use what another one with the same beginning has computed.

A tree: a node is a page, its path from the root the tokens before it. Nodes are found by comparing tokens, never by a hash alone, so one
text can never get another's page. Roots are named: sequences share within one root only.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator, Sequence


class Node:
    """One page of a tree; a root has none (-1)."""

    __slots__ = ("key", "next", "page", "parent")

    def __init__(self, page: int, key: Hashable, parent: Node | None) -> None:
        self.page, self.key, self.parent = page, key, parent
        self.next: dict[Hashable, Node] = {}


class Prefixes:
    """The indexed pages, and among them the idle ones, which no sequence holds: those that have not been used for longest go first.

    size: tokens of a page. Whoever holds a page holds all before it, and puts its pages aside from the last one on; so no idle page
    is given up before one that follows it.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._roots: dict[Hashable, Node] = {}
        self._node: dict[int, Node] = {}
        self._idle: dict[int, None] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._node

    def __len__(self) -> int:
        return len(self._node)

    @property
    def idle(self) -> int:
        """How many of them no sequence holds."""
        return len(self._idle)

    def find(self, root: Hashable, tokens: Sequence[int]) -> list[int]:
        """The pages of the longest beginning of `tokens` that is known, in order."""
        node, found = self._roots.get(root), []
        for key in self._keys(tokens, 0) if node is not None else ():
            node = node.next.get(key)  # type: ignore[union-attr]
            if node is None:
                break
            found.append(node.page)
        return found

    def add(self, root: Hashable, pages: Sequence[int], known: int, tokens: Sequence[int]) -> list[int]:
        """Index pages that hold `tokens`, the first `known` of which already are; the pages to use, in order.

        Where the same tokens have a page already, it is that one. Nothing is added behind a page that has been forgotten.
        """
        out = list(pages)
        node = self._node.get(pages[known - 1]) if known else self._roots.setdefault(root, Node(-1, root, None))
        for i, key in enumerate(self._keys(tokens, known) if node is not None else (), known):
            child = node.next.get(key)  # type: ignore[union-attr]
            if child is None:
                child = node.next[key] = self._node[pages[i]] = Node(pages[i], key, node)  # type: ignore[union-attr]
            out[i], node = child.page, child
        return out

    def wake(self, page: int) -> None:
        """A sequence holds it."""
        self._idle.pop(page, None)

    def rest(self, page: int) -> None:
        """No sequence holds it any more."""
        self._idle[page] = None

    def spare(self) -> int | None:
        """Forget an idle page that no other follows and return it; None if there is none."""
        for page in self._idle:
            if not self._node[page].next:
                self._cut(self._node[page])
                return page
        return None

    def forget(self, page: int) -> list[int]:
        """Forget a page and all behind it; those among them that were idle."""
        node = self._node.get(page)
        if node is None:
            return []
        gone, left = [], [node]
        while left:
            one = left.pop()
            left += one.next.values()
            gone.append(one)
        idle = [one.page for one in gone if one.page in self._idle]
        for one in reversed(gone):
            self._cut(one)
        return idle

    def _cut(self, node: Node) -> None:
        del self._node[node.page]
        self._idle.pop(node.page, None)
        parent = node.parent
        assert parent is not None
        del parent.next[node.key]
        if parent.page < 0 and not parent.next:
            del self._roots[parent.key]

    def _keys(self, tokens: Sequence[int], known: int) -> Iterator[bytes]:
        """The tokens of each full page."""
        for at in range(known * self._size, len(tokens) - self._size + 1, self._size):
            yield array("q", tokens[at : at + self._size]).tobytes()
