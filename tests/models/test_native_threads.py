"""Threads of the native decoder: who does a unit never changes a bit, and how many there are follows what forwards take."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.covering import slow_beyond

HERE = Path(__file__).parent / "native"
HEADERS = Path(__file__).parents[2] / "src" / "outrider" / "models" / "native"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the native decoder needs a C++ compiler")


def compile_(source: str, out: Path, *flags: str) -> Path:
    command = [
        COMPILER,
        "-std=c++17",
        "-ffp-contract=off",
        "-pthread",
        f"-I{HEADERS}",
        *flags,
        HERE / source,
        "-o",
        out,
    ]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return out


# ------------------------------------------------------------------------------------------------------------- who does a unit


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("-fsanitize=thread", "-g")], ids=["plain", "thread sanitizer"])
def test_bits_do_not_depend_on_who_is_held_up(flags: tuple[str, ...], tmp_path: Path) -> None:
    """2, 3 and 5 threads that sleep between units, come late or not at all; every output, key and value is compared."""
    program = compile_("stress.cpp", tmp_path / "stress", "-O1", "-DOUTRIDER_STRESS", *flags)
    done = subprocess.run([program, "4"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------------ how many


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = compile_("choice.cpp", tmp_path_factory.mktemp("choice") / "choice.so", "-O1", "-shared", "-fPIC")
    library = ctypes.CDLL(str(path))
    library.choice_new.restype = library.shared_choice.restype = ctypes.c_void_p
    library.choice_begin.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
    library.choice_end.argtypes = [
        ctypes.c_void_p, ctypes.c_int, ctypes.c_double, ctypes.c_double, *[ctypes.c_int] * 3,
    ]  # fmt: skip
    library.choice_free.argtypes = [ctypes.c_void_p]
    return library


UNKNOWN = 0, 1 << 30


@dataclass
class World:
    """A machine with its own clock. seconds(threads, now): what a forward of one row takes. crowded(now): crowded threads.

    room(now): what a count says of cores that others leave, at least and at most.
    """

    library: ctypes.CDLL
    seconds: Callable[[int, float], float]
    crowded: Callable[[float], int]
    most: int = 2
    room: Callable[[float], tuple[int, int]] = lambda now: UNKNOWN
    now: float = 100.0

    def __post_init__(self) -> None:
        self.choice = self.library.choice_new(self.most)

    def forward(self, rows: int = 1, scale: float = 1.0, decoder: int = 0) -> tuple[int, float]:
        """Threads and seconds of the next one; `scale` times as long as one row. decoder: 0 is a target, 1 a draft model."""
        threads = self.library.choice_begin(self.choice, decoder, rows)
        spent = scale * self.seconds(threads, self.now)
        self.now += spent
        self.library.choice_end(self.choice, decoder, spent, self.now, self.crowded(self.now), *self.room(self.now))
        return threads, spent

    def run(self, seconds: float) -> float:
        """Forwards a second, over so many seconds."""
        start, count = self.now, 0
        while self.now < start + seconds:
            self.forward()
            count += 1
        return count / (self.now - start)


@pytest.fixture
def world(library: ctypes.CDLL) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(*arguments: object, **options: object) -> World:
        made.append(World(library, *arguments, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        library.choice_free(one.choice)


FORWARDS = pytest.mark.parametrize("one", [1e-3, 5e-3, 5e-2], ids=["1 ms", "5 ms", "50 ms"])


@FORWARDS
def test_nothing_is_tried_on_cores_of_ones_own(world: Callable[..., World], one: float) -> None:
    calm = world(lambda n, now: one / n, lambda now: 0, most=4)
    assert {calm.forward()[0] for _ in range(2000)} == {4}


def test_one_thread_is_all_there_is(world: Callable[..., World]) -> None:
    alone = world(lambda n, now: 1e-3, lambda now: 1, most=1)
    assert {alone.forward()[0] for _ in range(500)} == {1}


@FORWARDS
@pytest.mark.parametrize("full", [0.5, 0.9, 1.5, 3.0], ids=lambda r: f"all threads {r} of one's time")
def test_beside_neighbours_it_is_nearly_the_better_of_both(
    world: Callable[..., World], one: float, full: float
) -> None:
    """At least 0.88 of the better choice's speed, whichever that is, once it has had a second to find out."""
    draw = random.Random(f"{one} {full}")
    noisy = world(lambda n, now: one * (1.0 if n == 1 else full) * draw.choice((0.5, 1.0, 1.5)), lambda now: 1)
    noisy.run(1.0)
    assert noisy.run(10.0) >= 0.88 / (one * min(1.0, full))


@FORWARDS
def test_it_follows_neighbours_that_come_and_go(world: Callable[..., World], one: float) -> None:
    """Four times as slow with all threads while they are there. All threads are back some seconds after they left."""
    busy = lambda now: int(105.0 <= now < 120.0)  # noqa: E731
    changing = world(lambda n, now: one if n == 1 else one * (4.0 if busy(now) else 0.5), busy)
    assert changing.run(5.0) >= 0.999 * 2 / one
    changing.run(1.0)
    assert changing.run(119.9 - changing.now) >= 0.9 / one
    changing.run(6.0)
    assert changing.run(5.0) >= 0.999 * 2 / one


def test_only_crowded_threads_are_left_out(world: Callable[..., World]) -> None:
    """Sixteen threads and one neighbour: fifteen go on."""
    large = world(lambda n, now: 1e-3 * (32.0 if n == 16 else 16.0) / n, lambda now: 1, most=16)
    large.run(1.0)
    sizes = [large.forward()[0] for _ in range(2000)]
    assert sizes.count(15) > 0.8 * len(sizes)


def test_forwards_of_other_sizes_are_not_compared(world: Callable[..., World]) -> None:
    """Long forwards that happen to fall into a trial do not make it look slow."""
    mixed = world(lambda n, now: 1e-3 * (1.0 if n == 1 else 2.0), lambda now: 1)
    sizes = []
    for i in range(6000):
        rows, scale = ((1, 1.0), (8, 4.0), (200, 30.0))[i % 7 % 3]
        sizes.append(mixed.forward(rows, scale)[0])
    assert sizes[3000:].count(1) > 0.9 * 3000


def test_a_decoder_that_rests_tries_no_more_than_one_that_works(world: Callable[..., World]) -> None:
    """Texts of 0.05 s, each after 5 s of rest, where two threads are three times as slow: trials cost at most a twentieth."""
    resting = world(lambda n, now: 1e-3 if n == 1 else 3e-3, lambda now: 1)
    resting.run(2.0)
    found = []
    for _ in range(200):
        resting.now += 5.0
        found.append(resting.run(0.05))
    assert sum(found) / len(found) >= 0.95 / 1e-3


def test_the_choice_of_a_draft_model_counts_what_it_costs_the_target(world: Callable[..., World]) -> None:
    """Two threads draft in half the time, and their target pays for it four times over, whatever it runs on itself."""
    helped = 0

    def seconds(threads: int, now: float) -> float:
        return 0.8e-3 * (1.0 if threads == 1 else 0.5) if drafting else 3.2e-3 + 1.6e-3 * (helped > 1)

    drafting, shared = False, world(seconds, lambda now: 1, room=lambda now: (1, 1))

    def run(until: float) -> int:
        nonlocal drafting, helped
        steps = 0
        while shared.now < until:
            drafting = True
            helped = shared.forward(decoder=1)[0]
            drafting = False
            shared.forward(decoder=0)
            steps += 1
        return steps

    run(102.0)
    assert run(122.0) >= 0.95 * 20.0 / 4e-3


def test_a_target_and_its_draft_model_go_and_come_together(world: Callable[..., World]) -> None:
    """The draft model's forwards are too few to tell: it follows its target at once."""
    busy = lambda now: 101.0 <= now < 110.0  # noqa: E731
    both = world(
        lambda n, now: 1e-3 * (1.0 if n == 1 else 4.0 if busy(now) else 0.5),
        lambda now: int(busy(now)),
        room=lambda now: (1, 1) if busy(now) else (2, 2),
    )
    for start, threads in ((100.5, 2), (101.0, 1), (110.0, 2)):
        both.run(start - both.now)
        both.run(0.1)
        assert [both.forward(decoder=i)[0] for i in (1, 0)] == [threads, threads]


def test_decoders_share_a_choice_if_they_may_use_as_many_threads(library: ctypes.CDLL) -> None:
    assert library.shared_choice(2) == library.shared_choice(2) != library.shared_choice(3)
    assert all(map(library.shared_choice, range(1, 100)))  # of a process with many such numbers


# ---------------------------------------------------------------------------------------------- how many, by the count of others


@FORWARDS
def test_where_the_count_leaves_no_core_threads_go_and_come_at_once(world: Callable[..., World], one: float) -> None:
    """Three counts are needed, and a trial may have begun: within a tenth of a second, or ten forwards."""
    busy = lambda now: 101.0 <= now < 110.0  # noqa: E731
    told = world(
        lambda n, now: one if n == 1 else one * (4.0 if busy(now) else 0.5),
        lambda now: int(busy(now)),
        room=lambda now: (1, 1) if busy(now) else (2, 2),
    )
    for start, threads in ((101.0, 1), (110.0, 2)):
        told.run(start - told.now)
        found = [told.forward()[0] for _ in range(max(10, int(0.1 / one)))]
        assert found[-1] == threads
    assert {told.forward()[0] for _ in range(200)} == {2}


def test_a_trial_contradicts_the_count(world: Callable[..., World]) -> None:
    """Neighbours of low priority: the count leaves one core, two threads are nearly twice as fast. At least 0.8 of their speed."""
    draw = random.Random(1)
    nice = world(
        lambda n, now: 1e-3 if n == 1 else 0.55e-3 * draw.choice((0.8, 1.2)),
        lambda now: int(draw.random() < 0.02),
        room=lambda now: (1, 1),
    )
    nice.run(2.0)
    assert nice.run(60.0) >= 0.8 / 0.55e-3


def test_a_count_that_does_not_see_the_neighbours_costs_little(world: Callable[..., World]) -> None:
    """Cores that a hypervisor takes: the count leaves all, two threads are twice as slow. At least 0.9 of one thread's speed."""
    stolen = world(lambda n, now: 1e-3 * n, lambda now: 1, room=lambda now: (2, 2))
    stolen.run(10.0)
    assert stolen.run(60.0) >= 0.9 / 1e-3


@pytest.mark.parametrize(
    ("runnable", "ours", "cores", "allowed", "room"),
    [
        (1, 1, 2, 2, (2, 2)),  # nobody else
        (2, 1, 2, 2, (1, 1)),
        (3, 2, 2, 2, (1, 1)),
        (9, 2, 2, 2, (0, 1)),  # a thread has to run somewhere
        (1, 2, 2, 2, (2, 2)),  # ours sleep already
        (31, 1, 64, 2, (0, 2)),  # thirty others of a large machine, who knows where
        (63, 1, 64, 4, (0, 2)),  # all but two are taken, at best by those on cores that are not ours
        (1, 1, 64, 4, (4, 4)),
        (0, 1, 2, 2, UNKNOWN),
    ],
)
def test_room_is_bounded_by_where_others_may_be(
    library: ctypes.CDLL, runnable: int, ours: int, cores: int, allowed: int, room: tuple[int, int]
) -> None:
    numbers = runnable, ours, cores, allowed
    assert (library.least_room(*numbers), library.most_room(*numbers)) == room


@pytest.mark.parametrize(
    ("text", "runnable"),
    [
        ("0.53 1.19 2.94 2/100 8554", 2),
        ("12.00 0.01 0.05 17/1229 9\n", 17),
        ("0.00 0.00 0.00 0/0 0", 0),
        ("", 0),
        ("cpu 1 2/3", 0),
    ],
)
def test_the_count_is_read_from_the_load_average(library: ctypes.CDLL, text: str, runnable: int) -> None:
    assert library.runnable(text.encode()) == runnable


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="no count on this system")
def test_room_of_this_machine_is_within_its_cores(library: ctypes.CDLL) -> None:
    """Unknown for more threads than there are cores: a thread bound to some sees no others."""
    allowed = len(os.sched_getaffinity(0))
    least, most = library.least_room_now(1, allowed), library.most_room_now(1, allowed)
    assert (0 <= least <= allowed and 1 <= most <= allowed) or (least, most) == UNKNOWN
    assert (library.least_room_now(1, allowed + 1), library.most_room_now(1, allowed + 1)) == UNKNOWN


# ------------------------------------------------------------------------------------------------------- on a simulated machine


@pytest.fixture(scope="module")
def seconds(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., float]:
    """What texts of 128 tokens take on the machine of machine.cpp, each after a rest; with drafts one of seconds."""
    program = compile_("machine.cpp", tmp_path_factory.mktemp("machine") / "machine", "-O2")

    def run(threads: int, way: int, levels: int) -> float:
        calls = [[str(x) for x in (program, threads, way, 128, seed, levels, 2.0 if levels else 0.3)] for seed in SEEDS]
        return sum(float(subprocess.run(c, check=True, capture_output=True, text=True).stdout) for c in calls)

    return cache(run)


WAYS = ["alone", "beside one", "beside two", "beside two, each in a group of its own"]
SEEDS = range(1, 4)
BESIDE = slow_beyond([(way, levels) for way in range(4) for levels in (0, 4)], [(0, 4), (1, 0), (2, 4), (3, 0)])
"""Each of WAYS with plain texts (0) and with drafts (4) in `make test-slow`; in `make test` the two take turns."""


@pytest.mark.parametrize(("way", "levels"), BESIDE)
def test_beside_spinning_neighbours_it_is_nearly_the_better_of_one_and_two_threads(
    seconds: Callable[..., float], way: int, levels: int
) -> None:
    """Texts of 128 tokens, each after one beside other neighbours: at least 0.9 of the better one's speed, alone at least 0.98."""
    better = min(seconds(1, way, levels), seconds(2, way, levels))
    assert better / seconds(0, way, levels) >= (0.9 if way else 0.98)


def test_without_the_count_it_is_not(seconds: Callable[..., float]) -> None:
    """The control: this machine is one where trials alone lose a tenth beside two neighbours."""
    assert min(seconds(1, 2, 4), seconds(2, 2, 4)) / seconds(-1, 2, 4) < 0.9


def test_with_a_choice_for_each_model_it_is_not(seconds: Callable[..., float]) -> None:
    """The control: when the neighbours have left, a draft model of its own choice stays on one thread beside a target on two."""
    assert min(seconds(1, 0, 4), seconds(2, 0, 4)) / seconds(-2, 0, 4) < 0.9
