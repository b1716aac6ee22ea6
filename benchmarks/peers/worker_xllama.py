"""Worker: llama.cpp's own server, as the package xllamacpp carries it: a GGUF file, plain or with a draft model.

options: `length`, the most tokens of a draft (0: plain); `sampled`: drafts are drawn from the draft's distribution, not its most
likely tokens; `repack`: weights may be rearranged at load. The prebuilt package is compiled for AVX2.
"""

from __future__ import annotations

import json
import urllib.request
from importlib.metadata import version
from typing import Any

import channel
import completion
import xllamacpp


def load(what: channel.Load) -> tuple[channel.Run, dict[str, str]]:
    """Start the server within this process, on a free port of 127.0.0.1."""
    params, options = xllamacpp.CommonParams(), what.options
    params.model.path, params.hostnames, params.port = what.target, ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel, params.warmup = what.length, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = what.threads
    params.no_extra_bufts = not options.get("repack", True)
    if options.get("length"):
        speculative, draft = params.speculative, params.speculative.draft
        speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        draft.mparams.path, draft.n_max, draft.n_min, draft.p_min = what.draft, options["length"], 0, 0.0
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = what.threads
        draft.probabilistic = options.get("sampled", False)
    server = xllamacpp.Server(params)

    def post(body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.load(reply)

    return completion.runner(post), {"xllamacpp": version("xllamacpp")}


if __name__ == "__main__":
    channel.serve(load)
