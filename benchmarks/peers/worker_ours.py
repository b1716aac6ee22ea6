"""Worker: Outrider through its public interface. Setting: length, the draft length (0 = plain decoding). options: `lengths`, which
ones there are; `target`, another target than the one that all workers load.

One engine per length, all over the same loaded weights.
"""

from __future__ import annotations

from typing import Any

import channel

import outrider
from outrider import Engine, SamplingParams  # before torch: threads are set up first

try:
    from outrider.build import companion
except ImportError:  # an earlier checkout, beside which this one is measured
    from outrider.engine.build import companion  # type: ignore[import-not-found,no-redef]

import torch  # isort: skip


def load(what: channel.Load) -> tuple[channel.Run, dict[str, str]]:
    """Build the engines of `options["lengths"]`."""
    torch.set_num_threads(what.threads)
    sizes = {"dtype": what.dtype, "capacity": what.capacity, "max_length": what.length}
    plain = Engine.build(target=what.options.get("target", what.target), draft="none", length=0, **sizes)
    engines = {n: companion(plain, what.draft, length=n) if n else plain for n in what.options["lengths"]}

    def run(command: channel.Command) -> dict[str, Any]:
        engine = engines[command.setting["length"]]
        params = [
            SamplingParams(
                temperature=command.temperature, max_tokens=command.tokens, ignore_eos=True, seed=command.seed + i
            )
            for i in range(len(command.prompts))
        ]
        before = engine.counts.steps

        def generate() -> list[list[int]]:
            return [list(result.outputs[0].token_ids) for result in engine.generate(command.prompts, params)]

        return channel.timed(generate, command) | {"calls": engine.counts.steps - before}

    return run, {"outrider": outrider.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    channel.serve(load)
