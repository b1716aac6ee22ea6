"""Compiles C++ files of this package once per machine and keeps the library in the user's cache.

The decoder and the rules' passes over a vocabulary have native twins. Both load through here, and both are done without where
nothing can be compiled: `load` then returns None and says why in the log.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

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
"""-O2: -O3 takes twice as long to compile for the same speed. No contraction: see target/native/simd.h."""
NATIVE = ("-march=native", "-mcpu=native")
"""How compilers are told to use all of this CPU: x86 and newer ARM compilers, older ARM compilers."""
TIMEOUT = 300.0


class BuildError(Exception):
    """Why a library cannot be had here. Never reaches a user: `load` logs it."""


@dataclass(frozen=True)
class Unit:
    """What is compiled into one library.

    name: for logs. folder, sources: the files; the first is compiled and includes the others. threads: whether it is worth OpenMP.
    instead: what is used where there is no library.
    """

    name: str
    folder: Path
    sources: tuple[str, ...]
    threads: bool
    instead: str


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/outrider/native`, or the same under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "outrider" / "native"


@functools.cache
def load(unit: Unit) -> ctypes.CDLL | None:
    """The compiled unit, or None. Takes some seconds the first time on a machine; a failure is logged once a process."""
    try:
        return _load(unit, cache_folder())
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        logger.info("no native %s: %s; %s", unit.name, error, unit.instead)
        return None


def _load(unit: Unit, folder: Path) -> ctypes.CDLL:
    """With torch's OpenMP runtime if it is wanted and its symbols are found, else for one thread."""
    if os.name != "posix":
        raise BuildError("it is built on Linux and macOS only")
    compiler = find_compiler()
    reasons: list[str] = []
    for openmp in (True, False) if unit.threads else (False,):
        try:
            return ctypes.CDLL(str(build(unit, compiler, folder, openmp=openmp)))
        except (BuildError, OSError) as error:
            reasons.append(str(error))
    raise BuildError("; ".join(dict.fromkeys(reasons)))


def find_compiler() -> list[str]:
    """The command of a C++ compiler: `$CXX`, else the first of c++, g++ and clang++ on the path."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in ([chosen] if chosen else []) + [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    raise BuildError("no C++ compiler (set CXX, or install g++ or clang++)")


def build(unit: Unit, compiler: list[str], folder: Path, *, openmp: bool, native: bool = True) -> Path:
    """Path of the shared library for this compiler and this CPU, compiled if it is not in `folder` yet.

    openmp: with threads. native: with every instruction of this CPU; False compiles what any CPU of this architecture runs.
    Raises BuildError when it cannot be compiled, or when what lies in the cache could be another user's work.
    """
    target, macros = _probe(compiler, native)
    flags = [*FLAGS, *target, *(["-fopenmp"] if openmp else [])]
    digest = hashlib.sha256("\0".join([*compiler, *flags, sys.platform, macros]).encode())
    for name in unit.sources:
        digest.update((unit.folder / name).read_bytes())
    _make_private(folder)
    library = folder / f"{digest.hexdigest()[:32]}.so"
    if not library.exists():
        _compile(compiler, flags, unit.folder / unit.sources[0], library)
    _check_owner(library)
    return library


def _probe(compiler: list[str], native: bool) -> tuple[list[str], str]:
    """Flags that select this CPU, and every macro the compiler defines under them: its version and the CPU's instructions."""
    options = [[flag] for flag in NATIVE] if native else []
    for flags in [*options, []]:
        done = subprocess.run(
            [*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, timeout=TIMEOUT
        )
        if done.returncode == 0:
            return flags, done.stdout
    raise BuildError(f"{compiler[0]} does not run: {_last_line(done.stderr)}")


def _compile(compiler: list[str], flags: list[str], source: Path, library: Path) -> None:
    """Compile beside the place and rename: two processes may do this at once."""
    logger.info("compiling %s (once per machine, some seconds)", source.name)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        unit, made = Path(name) / "unit.o", Path(name) / "unit.so"
        _call([*compiler, *flags, "-c", str(source), "-o", str(unit)])
        # Linked without -fopenmp: the OpenMP symbols stay open and resolve to the runtime torch has loaded.
        loose = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        _call([*compiler, "-shared", *loose, str(unit), "-o", str(made), "-lm", "-pthread"])
        os.chmod(made, 0o700)
        os.replace(made, library)
    logger.info("compiled in %.1f s: %s", time.perf_counter() - start, library)


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode != 0:
        raise BuildError(f"{command[0]} failed: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    errors = [line for line in text.splitlines() if "error" in line]
    return (errors or text.splitlines() or ["no message"])[0].strip()


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder)


def _check_owner(path: Path) -> None:
    """Code is loaded only from places that nobody but this user can write to."""
    about = path.stat()
    if about.st_uid != os.getuid():
        raise BuildError(f"{path} belongs to another user: remove it or set XDG_CACHE_HOME")
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"{path} can be written by other users: take their permission away (chmod go-w)")
