"""Sampled output of vLLM on the CPU under our audit: wrong as it is, right with our plug-in's repair."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.vllm_inside import speculative
from outrider.assets import shipped

from .servers import PARTS, Server, served

FLOAT = ["--dtype", "float32"]


def texts(server: Server, path: Path, count: int = 24, tokens: int = 40) -> None:
    draw = random.Random(1)
    asked = [[draw.randrange(3, 2048) for _ in range(12)] for _ in range(count)]
    rows = server.complete_all(asked, tokens=tokens, temperature=1.0, ignore_eos=True)
    with path.open("w") as out:
        for prompt, row in zip(asked, rows, strict=True):
            out.write(json.dumps({"prompt_token_ids": prompt, "token_ids": row["token_ids"]}) + "\n")


def audit(path: Path) -> dict[str, Any]:
    words = [
        "audit",
        "--texts",
        str(path),
        "--target",
        str(shipped("target")),
        "--dtype",
        "float32",
        "--ignore-eos",
        "--json",
    ]
    done = subprocess.run([sys.executable, "-m", "outrider", *words], capture_output=True, text=True)
    print(done.stdout[-1500:], done.stderr[-500:])
    return {"code": done.returncode, "out": done.stdout}


@pytest.mark.parametrize("method", ["draft_model", "eagle3"])
def test_repaired_passes(method: str, tmp_path: Path) -> None:
    with served(tmp_path, speculative(method, 4), *PARTS, *FLOAT) as server:
        assert "repaired vLLM's CPU stand-in" in server.log.read_text()
        assert server.log.read_text().count("repaired vLLM's CPU stand-in") == 1, "said once"
        texts(server, tmp_path / "texts.jsonl")
    found = audit(tmp_path / "texts.jsonl")
    assert found["code"] == 0, found


def test_unrepaired_fails(tmp_path: Path) -> None:
    """The control: the same server without our general plug-in."""
    with served(tmp_path, speculative("draft_model", 4), *FLOAT, plugins="outrider_ledger") as server:
        assert "repaired" not in server.log.read_text()
        texts(server, tmp_path / "texts.jsonl", count=8)
    found = audit(tmp_path / "texts.jsonl")
    assert found["code"] != 0, found


def test_our_lossy_rule_counts_what_it_spends(tmp_path: Path) -> None:
    """Within its budget per position, above zero; greedy text is untouched by it."""
    own = {"outrider": {"lengths": "fixed", "rule": "tv_budget:per_token=0.05", "allow_lossy": True}}
    with served(
        tmp_path, speculative("draft_model", 4), *PARTS, *FLOAT, "--additional-config", json.dumps(own)
    ) as server:
        server.complete_all([[5, 9, 77, 100 + i] for i in range(8)], tokens=32, ignore_eos=True)
        assert server.settled()["tap"]["all"]["bias"] == 0.0
        server.complete_all([[5, 9, 77, 100 + i] for i in range(16)], tokens=32, temperature=1.0, ignore_eos=True)
        found = server.settled()["tap"]["all"]
    assert 0.0 < found["bias"] <= 0.05 * found["judged"] + 1e-9
    assert abs(found["risk"] - found["rejected"]) < 6 * found["spread"] ** 0.5 + 6
