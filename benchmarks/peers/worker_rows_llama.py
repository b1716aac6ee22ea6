"""Worker of gguf_rows.py: `llama_decode` over some rows of one sequence, with the logits of all of them. Setting: `part`, `rows`,
`count`. options: `repack`, weights may be rearranged at load."""

from __future__ import annotations

import statistics
import time
from importlib.metadata import version
from typing import Any

import channel
import llama_cpp as ll


class Rows:
    """A model with `length` tokens in its cache."""

    def __init__(self, path: str, length: int, threads: int, repack: bool) -> None:
        options = ll.llama_model_default_params()
        options.use_extra_bufts = repack
        self._model = ll.llama_model_load_from_file(path.encode(), options)
        context = ll.llama_context_default_params()
        context.n_ctx, context.n_seq_max = max(256, length + 16), 1
        context.n_threads = context.n_threads_batch = threads
        self._context = ll.llama_init_from_model(self._model, context)
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self._batch, self._length = ll.llama_batch_init(length, 0, 1), length
        self._fill([3] * length, 0)
        self.decode()

    def prepare(self, rows: int) -> None:
        """Forget what is behind the cached tokens; the next `decode` is of so many rows."""
        ll.llama_memory_seq_rm(ll.llama_get_memory(self._context), 0, self._length, -1)
        self._fill([5] * rows, self._length)

    def decode(self) -> None:
        if code := ll.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode returned {code}")
        ll.llama_synchronize(self._context)

    def _fill(self, tokens: list[int], start: int) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for j, token in enumerate(tokens):
            batch.token[j], batch.pos[j], batch.logits[j], batch.n_seq_id[j] = token, start + j, True, 1
            batch.seq_id[j][0] = 0


def load(what: channel.Load) -> tuple[channel.Run, dict[str, str]]:
    """Both models."""
    ll.llama_backend_init()
    repack = what.options.get("repack", True)
    paths = {"target": what.target, "draft": what.draft}
    models = {k: Rows(path, what.length, what.threads, repack) for k, path in paths.items() if path != "none"}

    def run(command: channel.Command) -> dict[str, Any]:
        model, n, took = models[command.setting["part"]], command.setting["rows"], []
        for _ in range(command.setting["count"]):
            model.prepare(n)
            start = time.perf_counter()
            model.decode()
            took.append(time.perf_counter() - start)
        return {"seconds": statistics.median(took), "tokens": n}

    return run, {"llama-cpp-python": version("llama-cpp-python")}


if __name__ == "__main__":
    channel.serve(load)
