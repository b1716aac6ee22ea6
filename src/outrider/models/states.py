"""What a model keeps of each sequence's text, slot by slot, and how it forgets tokens again.

`SlotCaches` holds states that can be cropped, or none. `StateCaches` holds states that cannot be cut, such as the recurrent
states of Mamba: before rows that may be rejected it takes a snapshot, and after a rejection it goes back to the snapshot; the
tokens that were accepted since are read again, together with the next ones. Snapshots are taken by looking into the object that
the model returns, whatever its class: tensors that grow by one entry a token (the keys and values of a hybrid's attention) are
cut, all others are copied.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from outrider.errors import CapabilityError
from outrider.nn.kv import check_kept, check_room
from outrider.theory.recurrent import MERGED
from outrider.types import Rows, Segment

MOST_MERGED = MERGED
"""Accepted tokens that are read again in the same call as the next draft, at most: beyond, they get a call of their own, after
which a snapshot is taken, because otherwise one rejection after another would make them more and more."""
MOST_SNAPSHOTS = 16
"""Snapshots of a slot whose owner cuts it (a draft model does, after each draft), so that most cuts need no reading again."""

Path = tuple[Any, ...]
"""Where a tensor is in a state: the keys, indices and attribute names that lead to it."""
_WHOLE = (Tensor, nn.Module, type, ModuleType, FunctionType, MethodType)
_BROKEN = sys.maxsize


class SlotCaches:
    """One state of the model per slot (usually a cache of transformers), or its tokens if there is none.

    length: committed tokens of every slot. fed: tokens its state has seen; the next forward drops rejected ones.
    replayed: tokens that the latest forward read again.
    """

    def __init__(self, slots: int, capacity: int, rewinds: bool) -> None:
        self.slots, self.capacity, self.rewinds = slots, capacity, rewinds
        self.length: list[int] = [0] * slots
        self.fed: list[int] = [0] * slots
        self.state: list[Any] = [None] * slots
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self.replayed = 0

    def reserve(self, rows: Rows) -> None:
        """Raise CapacityError unless every segment continues its slot and fits."""
        check_room(rows, self.length, self.capacity)

    def commit(self, rows: Rows, paths: Sequence[Sequence[int]]) -> None:
        """Keep prefixes and the first nodes of each chain."""
        for s, path in zip(rows.segments, paths, strict=True):
            kept = s.fed + len(path)
            if list(path) != list(range(len(path))) or (not self.rewinds and kept != s.count):
                raise CapabilityError(
                    "this model's cache keeps chains from their first node only: use a drafter of chains"
                )
            self.length[s.slot] = s.cached + kept

    def truncate(self, slot: int, length: int) -> None:
        check_kept(slot, length, self.length)
        if not self.rewinds and 0 < length < self.length[slot]:
            raise CapabilityError("a recurrent state cannot be rewound: release the slot and feed the sequence again")
        self.length[slot] = length

    def release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.length[slot] = self.fed[slot] = 0
            self.state[slot] = None
            self.tokens[slot] = []

    def erase(self, slot: int) -> None:
        """Slots share nothing here: dropping the state is enough."""
        self.release([slot])


class StateCaches(SlotCaches):
    """States that cannot be cut, with snapshots to go back to.

    Accepted tokens that a rejection has undone are read again with the next rows of their slot: rows, not a call of the model.
    growing: the tensors that hold one entry per token, and the dimension of the entries: they are cut, not copied.
    opaque: classes of objects in a state that hold none of it, such as a configuration.
    """

    def __init__(self, slots: int, capacity: int, growing: Mapping[Path, int], opaque: tuple[type, ...] = ()) -> None:
        super().__init__(slots, capacity, True)
        self.growing, self.opaque = growing, opaque
        self.saved: list[list[Snapshot]] = [[] for _ in range(slots)]
        self.cut_by_owner = False

    def truncate(self, slot: int, length: int) -> None:
        """From the first cut that a step does not make itself, every state is kept for a while."""
        self.cut_by_owner |= 0 < length < self.length[slot]
        super().truncate(slot, length)

    def release(self, slots: Sequence[int]) -> None:
        super().release(slots)
        for slot in slots:
            self.saved[slot].clear()

    def calls(self, s: Segment, token: list[int], by_token: bool = False) -> Iterator[tuple[list[int], slice]]:
        """The calls of the model that read a segment, whose tokens are `token`: tokens that are read again, and which of the
        segment's follow in the same call (none: an empty slice). The caller makes each call by `advance` before it takes the next.

        by_token: the model continues a state by one token a call only. Then every row has a state of its own, so that a rejection
        chooses one and nothing is read again.
        """
        behind = self._resume(s.slot, s.cached, token)
        at_risk = bool(s.parent) or self.cut_by_owner
        if behind and (by_token or (at_risk and len(behind) > MOST_MERGED)):
            first = len(behind) if not (by_token and self.fed[s.slot]) else 1
            yield behind[:first], slice(0, 0)
            for one in behind[first:]:
                yield [one], slice(0, 0)
            behind = []
        if not by_token:
            if at_risk:
                self._keep(s.slot)
            yield behind, slice(0, s.count)
            return
        at = 0 if self.fed[s.slot] else s.fed  # a text may begin with many tokens
        if at:
            yield [], slice(0, at)
        for i in range(at, s.count):
            if i >= s.fed or self.cut_by_owner:
                self._keep(s.slot, len(s.parent))
            yield [], slice(i, i + 1)

    def _resume(self, slot: int, cached: int, token: list[int]) -> list[int]:
        """Bring a slot's state to its first `cached` tokens or fewer; returns those it has yet to read again.

        The slot's text becomes its first `cached` tokens and `token`.
        """
        saved = self.saved[slot]
        if self.fed[slot] > cached:
            while saved and saved[-1].count > cached:
                saved.pop()
            self.state[slot] = saved[-1].restore() if saved else None
            self.fed[slot] = saved[-1].count if saved else 0
        self.tokens[slot][cached:] = token
        behind = self.tokens[slot][self.fed[slot] : cached]
        self.replayed += len(behind)
        return behind

    def _keep(self, slot: int, others: int = 0) -> None:
        """Take a snapshot of the state as it is, beside the newest `others`; none of an empty state, which is simply made anew."""
        saved, count = self.saved[slot], self.fed[slot]
        if not count or (saved and saved[-1].count == count):
            return
        del saved[: max(0, len(saved) - max(others, MOST_SNAPSHOTS * self.cut_by_owner))]
        saved.append(Snapshot(self.state[slot], count, self.growing, self.opaque))

    def advance(self, slot: int, read: Callable[[Any], Any], count: int) -> None:
        """`read` takes the state and returns it after `count` further tokens. If it fails, the state is not used again."""
        before, self.fed[slot] = self.fed[slot], _BROKEN
        state = read(self.state[slot])
        self.state[slot], self.fed[slot] = state, before + count
        for snapshot in self.saved[slot]:
            snapshot.share(state, before + count)


class _Leaf:
    """A tensor of a snapshot. shared: its memory is also the running state's, which only adds entries behind it."""

    __slots__ = ("shared", "tensor")

    def __init__(self, tensor: Tensor, shared: bool) -> None:
        self.tensor, self.shared = tensor, shared


class Snapshot:
    """A state after `count` tokens, which can be restored any number of times."""

    def __init__(self, state: Any, count: int, growing: Mapping[Path, int], opaque: tuple[type, ...] = ()) -> None:
        self.count = count
        self._box = [state]
        self._growing: dict[Path, tuple[int, _Leaf]] = {}
        made: dict[int, _Leaf] = {}

        def leaf(path: Path, tensor: Tensor) -> _Leaf:
            if id(tensor) not in made:
                d = growing.get(path)
                shared = d is not None and tensor.shape[d] == count
                made[id(tensor)] = _Leaf(tensor if shared else tensor.clone(), shared)
                if d is not None and shared:
                    self._growing[path] = d, made[id(tensor)]
            return made[id(tensor)]

        self._contents = [
            (holder, {key: _over(value, leaf, (*path, key)) for key, value in _items(holder)})
            for path, holder in containers(self._box, opaque)
        ]

    def share(self, state: Any, count: int) -> None:
        """Keep the growing tensors as parts of the running state, which has seen `count` tokens, not beside it."""
        for path, (d, leaf) in self._growing.items():
            found = _find([state], path)
            if isinstance(found, Tensor) and found.shape[d] == count:
                leaf.tensor = found.narrow(d, 0, self.count)

    def restore(self) -> Any:
        """The state as it was; its copied tensors are copied again."""
        made: dict[int, Tensor] = {}

        def tensor(leaf: _Leaf) -> Tensor:
            if id(leaf) not in made:
                made[id(leaf)] = leaf.tensor if leaf.shared else leaf.tensor.clone()
            return made[id(leaf)]

        for holder, saved in self._contents:
            was = {key: _back(value, tensor) for key, value in saved.items()}
            if isinstance(holder, list):
                holder[:] = was.values()
            else:
                holder.clear()
                holder.update(was)
        return self._box[0]


def containers(root: list[Any], opaque: tuple[type, ...] = ()) -> Iterator[tuple[Path, list[Any] | dict[Any, Any]]]:
    """Every list, dictionary and object's attributes that `root` leads to, each once, and the way to it."""
    seen: set[int] = set()
    left: list[tuple[Path, Any]] = [((), root)]
    whole = (*_WHOLE, *opaque)
    while left:
        path, value = left.pop()
        if isinstance(value, tuple):
            left += [((*path, i), x) for i, x in enumerate(value)]
            continue
        if isinstance(value, whole):
            continue
        holder = value if isinstance(value, list | dict) else getattr(value, "__dict__", None)
        if not isinstance(holder, list | dict) or id(holder) in seen:
            continue
        seen.add(id(holder))
        yield path, holder
        left += [((*path, key), x) for key, x in _items(holder)]


def tensors_of(state: Any, opaque: tuple[type, ...] = ()) -> dict[Path, Tensor]:
    """The tensors of a state, by their places."""
    out: dict[Path, Tensor] = {}

    def note(path: Path, tensor: Tensor) -> Tensor:
        out[path] = tensor
        return tensor

    for path, holder in containers([state], opaque):
        for key, value in _items(holder):
            _over(value, note, (*path, key))
    return out


def growing_by_token(seen: Sequence[tuple[int, Mapping[Path, Tensor]]]) -> dict[Path, int]:
    """Which tensors hold one entry per token, and in which dimension. seen: (tokens, copies of the state's tensors after them),
    of a growing text."""
    out: dict[Path, int] = {}
    for path, last in seen[-1][1].items():
        each = [(n, t[path]) for n, t in seen if path in t and t[path].ndim == last.ndim]
        for d in range(last.ndim):
            if (len(each), last.shape[d]) == (len(seen), seen[-1][0]) and all(
                t.shape[d] == n and t.shape == last.narrow(d, 0, n).shape and t.equal(last.narrow(d, 0, n))
                for n, t in each
            ):
                out[path] = d
    return out


def _items(holder: list[Any] | dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    return iter(enumerate(holder) if isinstance(holder, list) else list(holder.items()))


def _over(value: Any, leaf: Callable[[Path, Tensor], Any], path: Path) -> Any:
    """`value` with every tensor of it, in tuples too, replaced by what `leaf` makes of it."""
    if isinstance(value, Tensor):
        return leaf(path, value)
    if isinstance(value, tuple):
        return _like(value, [_over(x, leaf, (*path, i)) for i, x in enumerate(value)])
    return value


def _back(value: Any, tensor: Callable[[_Leaf], Tensor]) -> Any:
    if isinstance(value, _Leaf):
        return tensor(value)
    return _like(value, [_back(x, tensor) for x in value]) if isinstance(value, tuple) else value


def _like(was: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    """A tuple of the same class; the same one if nothing in it changed."""
    if all(a is b for a, b in zip(was, items, strict=True)):
        return was
    return type(was)(*items) if hasattr(was, "_fields") else tuple(items)


def _find(root: list[Any], path: Path) -> Any:
    """What is at this place now, or None."""
    value: Any = root
    for key in path:
        holder = value if isinstance(value, list | dict | tuple) else getattr(value, "__dict__", {})
        try:
            value = holder[key]
        except (KeyError, IndexError):
            return None
    return value
