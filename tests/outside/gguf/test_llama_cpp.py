"""llama.cpp, as the package xllamacpp carries it, reads what `convert` writes of every family, and writes the same greedy text.

Tiny random models in float32.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from outrider import Engine, SamplingParams
from outrider.models.load import load_target
from tests.gguf_files import make_pair

pytest.importorskip("xllamacpp")
LONG = {
    "rope_type": "longrope",
    "rope_theta": 300.0,
    "short_factor": [1 + i / 3 for i in range(8)],
    "long_factor": [2.0] * 8,
}
UNSCALED = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 1.0, "original_max_position_embeddings": 256, "truncate": False,
}  # fmt: skip
"""llama.cpp rounds the ends of the ramp of gpt-oss's YaRN, its own configuration does not: without scaling there is no ramp."""
CASES = {
    "llama": ("llama", {}), "qwen2": ("qwen2", {}), "qwen3": ("qwen3", {}), "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 16, "layer_types": None, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}}),
    "phi3 longrope": (
        "phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 256, "max_position_embeddings": 512},
    ),
    "olmo2": ("olmo2", {}), "granite": ("granite", {}), "glm4": ("glm4", {}),
    "smollm3": ("smollm3", {"no_rope_layers": None, "num_hidden_layers": 5}),
    "mixtral": ("mixtral", {}), "qwen2moe": ("qwen2_moe", {}),
    "qwen3moe": ("qwen3_moe", {"norm_topk_prob": True}), "olmoe": ("olmoe", {"num_key_value_heads": 4}),
    "gpt-oss": ("gpt_oss", {"swiglu_limit": 7.0, "rope_parameters": UNSCALED}),
}  # fmt: skip
PROMPT, COUNT = [7, 50, 33, 91, 20, 18, 90, 64, 5, 5, 77, 30], 20
PEER = """
import json, os, sys, urllib.request, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = sys.argv[1], ["127.0.0.1"], 0
params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
body = {"prompt": json.loads(sys.argv[2]), "n_predict": int(sys.argv[3]), "temperature": 0.0, "return_tokens": True, "n_probs": 1,
        "samplers": ["temperature"], "cache_prompt": False}
request = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode(),
                                 {"Content-Type": "application/json"})
print("REPLY" + urllib.request.urlopen(request, timeout=60).read().decode(), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_writes_the_same_text(case: str, tmp_path: Path) -> None:
    family, overrides = CASES[case]
    sizes = {"hidden_size": 64, "intermediate_size": 96} | overrides
    _, file = make_pair(tmp_path, family, tokenizer=True, scale=0.7, **sizes)
    engine = Engine.build(target=load_target(file, dtype="float32"), draft="none", length=0, slots=1)
    params = SamplingParams(temperature=0.0, max_tokens=COUNT, logprobs=0)
    ours = engine.generate([PROMPT], params)[0].outputs[0]
    said = subprocess.run(
        [sys.executable, "-c", PEER, str(file), json.dumps(PROMPT), str(COUNT)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    reply = json.loads(said.split("REPLY", 1)[1])
    assert reply["tokens"] == list(ours.token_ids)[: len(reply["tokens"])] and len(reply["tokens"]) > 5
