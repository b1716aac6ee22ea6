"""Native libraries: from the wheel, or compiled once per machine and kept in the user's cache.

The decoder and the rules' passes over a vocabulary have native twins. Both load through here. The wheel's library is used if it has
all the instructions of this CPU that the kernels use; otherwise one is compiled; if that fails, a slower one of the wheel is used,
and without any, PyTorch. Everything but the fastest gives a notice. Imports nothing heavy: wheels are built with it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from outrider import isa

logger = logging.getLogger(__name__)
waiting = logging.getLogger("outrider.waiting")
"""Says what takes long and is done once; the command line shows it."""

FLAGS = (
    "-std=c++17",
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
)
"""-O2: -O3 takes twice as long to compile for the same speed. No contraction: see models/native/simd.h."""
NATIVE = (("-march=native",), ("-mcpu=native",), ())
"""Flags for all instructions of this CPU: x86 and newer ARM compilers, older ARM compilers, compilers without such a flag."""
STATIC = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections", "-Wl,-s")
"""For libraries used on other machines, where the C++ runtime may be older: the needed parts of it are linked in."""
TIMEOUT, WHEEL_TIMEOUT = 300.0, 7200.0
"""Seconds that a compiler has: somebody waits for a first start, and nobody for a wheel, which must not lack what a busy machine
took longer for."""
PACKAGE = Path(__file__).parent.parent
WHEEL = PACKAGE / "prebuilt"
"""The folder of a wheel's libraries; a source tree has none."""
COMPILER = "install g++ or clang++, or set CXX"
CACHE = "set XDG_CACHE_HOME to a folder that only you can write to, on a disk that programs may run from"


class BuildError(Exception):
    """Why a library is not available, and the remedy. Never reaches a user as an error: `load` turns it into a notice."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.remedy = remedy


@dataclass(frozen=True)
class Unit:
    """The sources of one library.

    name: of the source in `folder`, which includes all other C++ files there. threads: whether it uses OpenMP. instead: what
    happens without the library. shared: headers elsewhere, of what it exchanges with another library.
    """

    name: str
    folder: Path
    threads: bool
    instead: str
    shared: tuple[Path, ...] = ()

    @property
    def sources(self) -> list[Path]:
        """Its files; a library is identified by their contents."""
        return [*sorted(p for p in self.folder.iterdir() if p.suffix in (".cpp", ".h")), *self.shared]


FED = PACKAGE / "nn" / "fed.h"
DECODER = Unit(
    "decoder", PACKAGE / "models" / "native", True, "decoding runs on PyTorch, up to four times slower", (FED,)
)
PASSES = Unit("passes", PACKAGE / "verify", False, "drafts are verified by PyTorch, which is slower", (FED,))
UNITS = (DECODER, PASSES)


@dataclass(frozen=True)
class Loaded:
    """A unit's library, or None if PyTorch is used instead; and a sentence for the user if it is not the fastest possible."""

    library: ctypes.CDLL | None
    notice: str | None = None


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/outrider/native`, or the same under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "outrider" / "native"


@functools.cache
def load(unit: Unit) -> Loaded:
    """The unit's library, loaded once per process. May compile for some seconds the first time on a machine.

    Raises ConfigError if OUTRIDER_ISA names something unsupported.
    """
    choice = isa.chosen()
    ready = prebuilt(unit, choice)
    try:
        if ready is not None and (choice.prebuilt or ready[1] == choice.level):
            return Loaded(ctypes.CDLL(str(ready[0])))
        if choice.prebuilt:
            raise BuildError(
                f"no library came with this installation, and {isa.VARIABLE} asks for it", f"unset {isa.VARIABLE}"
            )
        return _compiled(unit, None if choice.native else choice.level)
    except (BuildError, OSError) as error:
        return _without(unit, error, ready)


def prebuilt(unit: Unit, choice: isa.Choice) -> tuple[Path, isa.Level] | None:
    """The wheel's best library among those whose instructions may be used here, or None."""
    for level in reversed(isa.levels() if choice.level is not None and sys.platform == "linux" else ()):
        path = WHEEL / isa.machine() / wheel_name(unit, level)
        if isa.levels().index(level) <= isa.levels().index(choice.level) and path.is_file():  # type: ignore[arg-type]
            return path, level
    return None


def wheel_name(unit: Unit, level: isa.Level) -> str:
    """A library's file name in a wheel; it contains a digest of the sources, so that a stale one is never loaded."""
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for source in unit.sources:
        digest.update(source.read_bytes())
    return f"{unit.name}-{level.name}-{digest.hexdigest()[:16]}.so"


def _without(unit: Unit, error: Exception, ready: tuple[Path, isa.Level] | None) -> Loaded:
    """The fallback if the best library is not available, with the reason."""
    why, remedy = str(error), getattr(error, "remedy", CACHE)
    if ready is not None:
        try:
            library = ctypes.CDLL(str(ready[0]))
        except OSError as broken:
            why += f"; the wheel's library does not load ({broken})"
        else:
            slower = f"the native library '{unit.name}' uses {ready[1].kind} instructions, not all of this CPU's"
            return Loaded(library, f"{slower}: {why}; {remedy}")
    logger.info("no native %s: %s", unit.name, why)
    return Loaded(None, f"{unit.instead}: {why}; {remedy}")


def _compiled(unit: Unit, level: isa.Level | None) -> Loaded:
    """Compile into the cache, or into a folder for this process alone if the cache cannot be used."""
    if os.name != "posix":
        raise BuildError("native libraries are compiled on Linux and macOS only", "use one of these")
    compiler = find_compiler()
    try:
        return _linked(unit, compiler, cache_folder(), level)
    except (BuildError, OSError) as error:
        if getattr(error, "remedy", CACHE) != CACHE:
            raise
        with tempfile.TemporaryDirectory(prefix="outrider-") as folder:  # a loaded library no longer needs its file
            made = _linked(unit, compiler, Path(folder), level)
        again = f"the native library '{unit.name}' is compiled again at every start, for some seconds: {error}; {CACHE}"
        return Loaded(made.library, again)


def _linked(unit: Unit, compiler: list[str], folder: Path, level: isa.Level | None) -> Loaded:
    """Compile with torch's OpenMP runtime if the unit uses it and its symbols are found, else for one thread."""
    first: Exception | None = None
    for openmp in (True, False) if unit.threads else (False,):
        try:
            library = ctypes.CDLL(str(build(unit, compiler, folder, openmp=openmp, level=level)))
        except (BuildError, OSError) as error:
            if first is not None or not unit.threads:
                raise
            first = error
        else:
            alone = f"the native library '{unit.name}' uses one thread: {first}; set CXX to a compiler with OpenMP, g++ for one"
            return Loaded(library, None if first is None else alone)
    raise AssertionError("unreachable")


def find_compiler() -> list[str]:
    """The command of a C++ compiler: `$CXX`, else the first of c++, g++ and clang++ on the path."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in ([chosen] if chosen else []) + [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    raise BuildError("there is no C++ compiler", COMPILER)


def build(unit: Unit, compiler: list[str], folder: Path, *, openmp: bool, level: isa.Level | None = None) -> Path:
    """Path of the shared library for this compiler and these instructions, compiled if it is not in `folder` yet.

    openmp: with threads. level: its instructions; None for all of this CPU's. Raises BuildError when it cannot be compiled, or when
    another user could have written to the cache.
    """
    target, macros = _probe(compiler, NATIVE if level is None else (level.flags,))
    flags = [*FLAGS, *target, *(["-fopenmp"] if openmp else [])]
    digest = hashlib.sha256("\0".join([*compiler, *flags, sys.platform, macros]).encode())
    for source in unit.sources:
        digest.update(source.read_bytes())
    _make_private(folder)
    library = folder / f"{digest.hexdigest()[:32]}.so"
    if not library.exists():
        compile_unit(unit, compiler, flags, library)
    _check_owner(library)
    return library


def build_for_wheel(unit: Unit, compiler: list[str], level: isa.Level, folder: Path) -> Path:
    """Compile the library for any machine with these instructions, under its name in a wheel. Raises BuildError."""
    library = folder / wheel_name(unit, level)
    compile_unit(
        unit, compiler, [*FLAGS, *level.flags, *(["-fopenmp"] if unit.threads else [])], library, STATIC, WHEEL_TIMEOUT
    )
    library.chmod(0o755)
    return library


def _probe(compiler: list[str], options: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], str]:
    """The first flags that the compiler accepts, and the macros it defines with them: its version and the CPU's instructions."""
    error = ""
    for flags in options:
        done = _run([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
        if done.returncode == 0:
            return flags, done.stdout
        error = error or _last_line(done.stderr)
    raise BuildError(f"{compiler[0]} does not run ({error})", COMPILER)


def compile_unit(
    unit: Unit,
    compiler: list[str],
    flags: Sequence[str],
    library: Path,
    link: Sequence[str] = (),
    patience: float = TIMEOUT,
) -> None:
    """Compile to a temporary file and rename it: two processes may do this at once.

    link: further flags of the linker. patience: seconds for each of both.
    """
    waiting.info(
        "compiling the native library '%s', once on this machine: the next start does not wait for it", unit.name
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        part, made = Path(name) / "unit.o", Path(name) / "unit.so"
        where = [f"-I{header.parent}" for header in unit.shared]
        _call([*compiler, *flags, *where, "-c", str(unit.folder / f"{unit.name}.cpp"), "-o", str(part)], patience)
        # Linked without -fopenmp: the OpenMP symbols stay open and resolve to the runtime torch has loaded.
        loose = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        _call([*compiler, "-shared", *loose, *link, str(part), "-o", str(made), "-lm", "-pthread"], patience)
        os.chmod(made, 0o700)
        os.replace(made, library)
    logger.info("compiled in %.1f s: %s", time.perf_counter() - start, library)


def _run(command: list[str], patience: float = TIMEOUT) -> subprocess.CompletedProcess[str]:
    """Run a compiler in a process group of its own: where nobody waits for it any longer, what it has started ends with it."""
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    try:
        with subprocess.Popen(
            command, stdin=nothing, stdout=pipe, stderr=pipe, text=True, errors="replace", process_group=0
        ) as running:
            try:
                said = running.communicate(timeout=patience)
            except BaseException:  # an interruption, too
                if running.returncode is None:  # otherwise the number is no longer its own
                    os.killpg(running.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(command, running.returncode, *said)
    except subprocess.TimeoutExpired:
        raise BuildError(
            f"{command[0]} did not end within {patience:.0f} s", "try again when the machine is less busy"
        ) from None
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} does not run ({error})", COMPILER) from None


def _call(command: list[str], patience: float) -> None:
    done = _run(command, patience)
    if done.returncode != 0:
        raise BuildError(f"{command[0]} failed ({_last_line(done.stderr)})", COMPILER)


def _last_line(text: str) -> str:
    errors = [line for line in text.splitlines() if "error" in line]
    return (errors or text.splitlines() or ["no message"])[0].strip()


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{folder} cannot be made ({error.strerror})", CACHE) from None
    _check_owner(folder)


def _check_owner(path: Path) -> None:
    """Raise BuildError for a path that another user can write to: code is never loaded from there."""
    about = path.stat()
    if about.st_uid != os.getuid():
        raise BuildError(f"{path} belongs to another user", CACHE)
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"{path} can be written by other users (chmod go-w takes that away)", CACHE)
