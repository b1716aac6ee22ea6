"""Worker of gguf_rows.py: forwards of Outrider over rows of one sequence. Setting: `part`, target or draft; `rows`; `count`."""

from __future__ import annotations

import statistics
import time
from typing import Any

import channel

import outrider
from outrider.models.load import load_target  # before torch: threads are set up first
from outrider.types import Draft, Rows

import torch  # isort: skip


def load(what: channel.Load) -> tuple[channel.Run, dict[str, str]]:
    """Both models, each with `length` cached tokens."""
    torch.set_num_threads(what.threads)
    models = {}
    for part, path in {"target": what.target, "draft": what.draft}.items():
        if path == "none":
            continue
        model = load_target(path)
        kv = model.new_kv(1, what.length + 16)
        first = Rows.assemble([0], [[3] * what.length], [0], Draft.empty(1))
        model.forward(first, kv)
        kv.commit(first, [()])
        models[part] = model, kv

    @torch.inference_mode()
    def run(command: channel.Command) -> dict[str, Any]:
        (model, kv), n = models[command.setting["part"]], command.setting["rows"]
        rows = Rows.assemble([0], [[7]], [what.length], Draft.join([([5] * (n - 1), list(range(-1, n - 2)))]))
        took = []
        for _ in range(command.setting["count"]):
            start = time.perf_counter()
            model.forward(rows, kv)
            took.append(time.perf_counter() - start)
        return {"seconds": statistics.median(took), "tokens": n}

    return run, {"outrider": outrider.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    with torch.inference_mode():
        channel.serve(load)
