"""llama.cpp's own HTTP server, as the package xllamacpp carries it, on the shipped pair turned into GGUF.

llama_server.py TARGET DRAFT|ngram|none PORT FOLDER     TARGET, DRAFT: checkpoints; FOLDER: for the GGUF files
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import xllamacpp

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "peers"))

from gguf_file import convert


def converted(model: str, folder: Path) -> str:
    """The checkpoint as a GGUF file with its tokenizer."""
    out = folder / f"{Path(model).name}.gguf"
    if not out.exists():
        convert(Path(model), out, tokenizer=True)
    return str(out)


def main(target: str, draft: str, port: int, folder: Path) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = converted(target, folder)
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_ctx, params.n_parallel = 2048, 2
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    params.endpoint_metrics = params.endpoint_props = True
    kind = xllamacpp.common_speculative_type
    if draft == "ngram":
        params.speculative.types = [kind.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
    elif draft != "none":
        params.speculative.types = [kind.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        params.speculative.draft.mparams.path = converted(draft, folder)
        params.speculative.draft.n_max = 4
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
