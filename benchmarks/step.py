"""Where does the time of a speculative step go? Every part of it, in microseconds, beside a plain step and a bare forward.

    python benchmarks/step.py [--threads 2] [--tokens 96] [--count 4] [--temperature 0 1] [--only "EAGLE, 4"]
    python benchmarks/step.py --target big.gguf --draft small.gguf --lengths 0 4

Parts are functions of the engine, timed where they stand, each without the parts inside it; `other` is what no part took, so the
lines add up to the step. All are means over the faster half of the steps, since what neighbours do only adds to them. Clocks cost
time too: the same steps are also made without them, in turn. First v(R): the target's forward for R rows against one, alone.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from drafts import DRAFTS

from outrider.assets import shipped, shipped_prompts
from outrider.build import Engine
from outrider.drafters.tree import draws, forest, growth
from outrider.engine import core, step
from outrider.engine.state import StepState
from outrider.models.load import load_target
from outrider.nn import picks
from outrider.params import SamplingParams
from outrider.types import Draft, Rows

NOW = time.perf_counter
ROWS: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8)
CONTEXT = 128


class Clock:
    """Seconds of parts, each without the parts inside it."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.steps: list[dict[str, tuple[float, int]]] = []
        self._inside: list[float] = []

    def close(self) -> None:
        """The parts so far are a step."""
        self.steps.append({name: (spent, self.calls[name]) for name, spent in self.spent.items()})
        self.spent.clear()
        self.calls.clear()

    def fast(self) -> tuple[dict[str, float], dict[str, float]]:
        """Mean seconds and calls of each part over the faster half of the steps."""
        whole = [(sum(spent for spent, _ in step.values()), n) for n, step in enumerate(self.steps)]
        chosen = [self.steps[n] for _, n in sorted(whole)[: max(1, len(whole) // 2)]]
        names = {name for step in chosen for name in step}
        mean = lambda at: {k: sum(step.get(k, (0, 0))[at] for step in chosen) / len(chosen) for k in names}  # noqa: E731
        return mean(0), mean(1)

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **named: Any) -> Any:
            self._inside.append(0.0)
            start = NOW()
            try:
                return call(*args, **named)
            finally:
                took = NOW() - start
                self.spent[name] += took - self._inside.pop()
                self.calls[name] += 1
                if self._inside:
                    self._inside[-1] += took
                else:
                    self.close()

        return timed


def places(engine: Engine) -> Iterator[tuple[str, Any, str]]:
    """(part, object, attribute) of every part of this engine's steps."""
    parts: Any = engine.parts
    drafter: Any = parts.drafter
    yield from ((name, StepState, name) for name in ("plan", "take_pending", "settle", "record"))
    yield from (("kept paths", step, "kept_paths"), ("evidence", step, "evidence_of"), ("budget", step, "draft_budget"))
    yield from (("sanitize", step, "sanitize_draft"), ("assemble", step, "assemble"), ("emit", step, "emit"))
    yield from (
        ("nonfinite rows", step, "blank_nonfinite_rows"),
        ("row contexts", step, "row_contexts"),
        ("rule", step, "judge"),
    )
    yield "publish", engine.state.room, "publish"
    yield "target, Python", parts.target, "forward"
    if getattr(parts.target, "native", None) is not None:
        yield "target, forward", parts.target.native, "_forward"
    yield "commit", parts.kv, "commit"
    yield "reserve", parts.kv, "reserve"
    yield "drafter", drafter, "draft"
    run = getattr(drafter, "_run", None)
    layers = getattr(run, "_layers", None)
    if layers is not None:
        yield "draft forward, Python", layers, "forward"
        yield "draft forward", layers, "_forward"
    heads = getattr(drafter, "_predict", None) or getattr(run, "_head", None)
    if hasattr(heads, "_forward"):
        yield "heads", heads, "_forward"
    model: Any = getattr(drafter, "model", None)
    if getattr(model, "native", None) is not None:
        yield "draft forward, Python", model, "forward"
        yield "draft forward", model.native, "_forward"
    if hasattr(drafter, "growth"):
        yield "growth", drafter.growth, "grow"
    yield from (("draw", draws, name) for name in ("fetch",) if hasattr(draws, name))
    yield "draw", growth, "fetch"
    yield "forest", forest.Forest, "draft"
    library = picks.chain_library(torch.ones(1, 1)) if hasattr(picks, "chain_library") else None
    if library is not None:
        yield "chain: forwards and draws", library, "outrider_chain"
    yield from (("verify", step, "verify"), ("propose", step, "propose"), ("noise and allowances", step, "noise_of"))
    yield "noise and allowances", step, "allowances"


@contextmanager
def watched(engine: Engine, clock: Clock) -> Iterator[None]:
    """Inside, the parts of the engine's steps are timed."""
    undo: list[tuple[Any, str, Any]] = []
    for name, where, attribute in places(engine):
        own = attribute in vars(where) if hasattr(where, "__dict__") else False
        before = getattr(where, attribute)
        undo.append((where, attribute, before if own else None))
        setattr(where, attribute, clock.around(name, before))
    state = engine.state
    pipeline = type(state.parts.pipeline)
    before = pipeline.__call__
    undo.append((pipeline, "__call__", before))
    pipeline.__call__ = clock.around("distributions", before)  # type: ignore[method-assign]
    steps = core.step
    undo.append((core, "step", steps))
    core.step = clock.around("other", steps)
    try:
        yield
    finally:
        for where, attribute, kept in reversed(undo):
            if kept is None:
                delattr(where, attribute)
            else:
                setattr(where, attribute, kept)


def profile(name: str, engine: Engine, prompts: list[str] | list[list[int]], temperature: float, tokens: int) -> None:
    def run(prompt: str | list[int], n: int) -> list[float]:
        """Seconds of every step after the one that reads the prompt."""
        engine.submit(prompt, SamplingParams(temperature=temperature, max_tokens=tokens, seed=n, ignore_eos=True))
        took = []
        while engine.busy:
            start = NOW()
            engine.step()
            took.append(NOW() - start)
        return took[1:]

    run(prompts[0], 0)
    bare, clock = list[float](), Clock()
    for n, prompt in enumerate(prompts[1:]):
        bare += run(prompt, n)
        with watched(engine, clock):
            engine.reset()
            run(prompt, n)
    spent, calls = clock.fast()
    whole, without = sum(spent.values()), statistics.mean(sorted(bare)[: len(bare) // 2])
    made = engine.counts.emitted / engine.counts.steps
    print(
        f"T={temperature:.0f} {name}: {1e6 * whole:.0f} us a step, {1e6 * without:.0f} without clocks; {made:.2f} tokens a step"
    )
    for part, took in sorted(spent.items(), key=lambda pair: -pair[1]):
        print(f"    {part:26}{1e6 * took:8.0f} us {100 * took / whole:5.1f}%{calls[part]:7.1f} calls")


def widths(path: str, rounds: int) -> None:
    """v(R): the target's forward for a chain of R rows behind 128 cached ones, alone; the least of the rounds."""
    target = load_target(path)
    kv = target.new_kv(1, CONTEXT + 16)
    made = {
        n: Rows.assemble([0], [[7]], [CONTEXT], Draft.join([([5] * (n - 1), list(range(-1, n - 2)))])) for n in ROWS
    }
    first = Rows.assemble([0], [[3] * CONTEXT], [0], Draft.empty(1))
    target.forward(first, kv)
    kv.commit(first, [()])
    least = dict.fromkeys(ROWS, float("inf"))
    for _ in range(rounds):
        for n, at in made.items():
            start = NOW()
            target.forward(at, kv)
            least[n] = min(least[n], NOW() - start)
    print("rows  " + "  ".join(f"{n}: {1e6 * t:.0f} us ({t / least[1]:.2f})" for n, t in least.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--only", nargs="+", default=list(DRAFTS))
    parser.add_argument("--target", help="instead of the shipped pair and its drafters: a model, with random prompts")
    parser.add_argument("--draft", default="none", help="with --target: its draft model")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[0, 4], help="with --target: draft lengths, 0 for none"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.threads == 1:
        global NOW
        NOW = time.thread_time
    widths(args.target or str(shipped("target")), 100)
    prompts: Any = shipped_prompts()[: args.count + 1]
    engines = {name: partial(Engine.build, draft=DRAFTS[name][0], length=DRAFTS[name][1]) for name in args.only}
    if args.target:
        chance = random.Random(0)
        prompts = [[chance.randrange(500) for _ in range(16)] for _ in range(args.count + 1)]
        drafts = {n: args.draft if n else "none" for n in args.lengths}
        engines = {
            f"drafts of {n}": partial(Engine.build, target=args.target, draft=d, length=n) for n, d in drafts.items()
        }
    for temperature in args.temperature:
        for name, build in engines.items():
            profile(name, build(max_length=512), prompts, temperature, args.tokens)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
