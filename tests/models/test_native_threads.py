"""Threads of the native decoder: who does a unit never changes a bit, and how many there are follows what forwards take."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

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
    library.choice_new.restype = ctypes.c_void_p
    library.choice_begin.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_int]
    library.choice_end.argtypes = [ctypes.c_void_p, ctypes.c_double, ctypes.c_double]
    library.choice_free.argtypes = [ctypes.c_void_p]
    return library


@dataclass
class World:
    """A machine with its own clock. seconds(threads, now): what a forward of one row takes. crowded(now): crowded threads."""

    library: ctypes.CDLL
    seconds: Callable[[int, float], float]
    crowded: Callable[[float], int]
    most: int = 2
    now: float = 100.0

    def __post_init__(self) -> None:
        self.choice = self.library.choice_new()

    def forward(self, rows: int = 1, scale: float = 1.0) -> tuple[int, float]:
        """Threads and seconds of the next one; `scale` times as long as one row."""
        threads = self.library.choice_begin(self.choice, self.most, rows, self.now, self.crowded(self.now))
        spent = scale * self.seconds(threads, self.now)
        self.now += spent
        self.library.choice_end(self.choice, spent, self.now)
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
