"""Worker: llama.cpp through llama-cpp-python's low-level interface, plain decoding of one or several sequences.

The checkpoint is converted once, beside itself. Sampling is llama.cpp's own chain: temperature and its random number
generator, or greedy, with nothing cut from the distribution.
"""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from pathlib import Path
from typing import Any

import channel
import llama_cpp as ll
from gguf_file import convert


class Decoder:
    """One model and one context with room for `capacity` sequences of `length` tokens."""

    def __init__(self, file: Path, capacity: int, length: int, threads: int) -> None:
        ll.llama_backend_init()
        options = ll.llama_model_default_params()
        self._model = ll.llama_model_load_from_file(str(file).encode(), options)
        context = ll.llama_context_default_params()
        context.n_ctx = capacity * length
        context.n_seq_max = capacity
        context.n_batch = context.n_ubatch = capacity * length
        context.n_threads = context.n_threads_batch = threads
        self._context = ll.llama_init_from_model(self._model, context)
        self._batch = ll.llama_batch_init(capacity * length, 0, 1)
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp could not load {file}")

    def generate(self, prompts: list[list[int]], tokens: int, temperature: float, seed: int) -> list[list[int]]:
        """`tokens` new tokens behind each prompt."""
        ll.llama_memory_clear(ll.llama_get_memory(self._context), True)
        samplers = [_sampler(temperature, seed + i) for i in range(len(prompts))]
        self._decode([(token, at, i, at == len(p) - 1) for i, p in enumerate(prompts) for at, token in enumerate(p)])
        rows = [sum(map(len, prompts[: i + 1])) - 1 for i in range(len(prompts))]
        new: list[list[int]] = [[] for _ in prompts]
        for step in range(tokens):
            for i, row in enumerate(rows):
                new[i].append(ll.llama_sampler_sample(samplers[i], self._context, row))
            if step < tokens - 1:
                self._decode([(new[i][-1], len(p) + step, i, True) for i, p in enumerate(prompts)])
                rows = list(range(len(prompts)))
        for sampler in samplers:
            ll.llama_sampler_free(sampler)
        return new

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """One forward of (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for j, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[j], batch.pos[j], batch.logits[j] = token, position, wanted
            batch.n_seq_id[j] = 1
            batch.seq_id[j][0] = sequence
        if code := ll.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")


def _sampler(temperature: float, seed: int) -> ctypes.c_void_p:
    chain = ll.llama_sampler_chain_init(ll.llama_sampler_chain_default_params())
    if temperature > 0:
        ll.llama_sampler_chain_add(chain, ll.llama_sampler_init_temp(temperature))
        ll.llama_sampler_chain_add(chain, ll.llama_sampler_init_dist(seed & 0xFFFFFFFF))
    else:
        ll.llama_sampler_chain_add(chain, ll.llama_sampler_init_greedy())
    return chain


def load(what: channel.Load) -> tuple[channel.Run, dict[str, str]]:
    """Convert if needed, and load."""
    folder = Path(what.target)
    file = folder.with_name(folder.name + ".gguf")
    if not file.exists():
        convert(folder, file)
    decoder = Decoder(file, what.capacity, what.length, what.threads)

    def run(command: channel.Command) -> dict[str, Any]:
        return channel.timed(
            lambda: decoder.generate(command.prompts, command.tokens, command.temperature, command.seed), command
        )

    return run, {"llama-cpp-python": version("llama-cpp-python")}


if __name__ == "__main__":
    channel.serve(load)
