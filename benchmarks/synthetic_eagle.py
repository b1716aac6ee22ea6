"""EAGLE beside the draft model on a synthetic pair, at the same acceptance: does it gain what its cost predicts?

    python benchmarks/synthetic.py 500m 0.8                                # 1.1 GB in runs/synthetic/500m-0.8
    python benchmarks/synthetic_eagle.py [--pair 500m-0.8] [--length 4] [--threads 2]

EAGLE drafters of random weights stand beside the pair: one layer as the target's with a head of all tokens (`whole`), with a head
of a quarter of them, as published ones have (`quarter`), and half as wide (`half`). Random weights are accepted nowhere, so
acceptance is set: first the draft model decodes the prompts greedily, and it is written down how many tokens each step kept. Then
the drafters make their drafts as always, and the tokens of a draft are replaced by those of the text, of which the first wrong one
stands where the draft model's was. So every step of every arm keeps what the draft model's kept, and only times differ.

Predicted: a step takes the target's pass of `length + 1` rows, the draft's forwards (each timed alone, a pass of the target before
it), and what a plain step has besides its pass. Measured: tokens per second over the draft model, paired by prompt, 95%.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from drafts import CONTEXT, bytes_of, cache_of, in_steps, target_pass
from synthetic import ROOT

from outrider.build import Engine, build_engine, companion
from outrider.drafters.eagle import Eagle3Network
from outrider.drafters.eagle.forward import forward_of
from outrider.drafters.eagle.network import EagleConfig
from outrider.evaluate.measure import Arm, run_arms
from outrider.evaluate.records import ArmSummary, summarise
from outrider.evaluate.statistics.ratios import Ratio
from outrider.nn.drafts import Rows
from outrider.params import SamplingParams
from outrider.types import Draft

KEPT = 3
"""Rows that EAGLE reads before a draft, about as many as a step keeps."""
SHAPES = {"whole": (1, 1), "quarter": (1, 4), "half": (2, 4)}
"""Name -> by what the target's width and its vocabulary are divided."""


@dataclass(slots=True)
class Script:
    """What one text's steps are to keep. text: prompt and continuation; lengths: of the text before every draft."""

    text: tuple[int, ...] = ()
    lengths: list[int] = field(default_factory=list)

    def tokens(self, length: int, count: int, vocab: int) -> list[int]:
        """The draft of `count` tokens behind so much of the text."""
        later = [n for n in self.lengths if n > length]
        kept = (min(later) if later else len(self.text)) - length - 1
        known = [self.text[length + j] if length + j < len(self.text) else 0 for j in range(count)]
        return [token if j < kept else (token + 1) % vocab for j, token in enumerate(known)]


def write_down(engine: Engine, prompts: Sequence[list[int]], params: SamplingParams) -> dict[tuple[int, ...], Script]:
    """What the engine's drafter earns on each of these, by the prompt."""
    drafter: Any = engine.parts.drafter
    inner, scripts = drafter.draft, {}
    for prompt in prompts:
        script = scripts[tuple(prompt)] = Script()

        def draft(evidence: Any, budget: Any, script: Script = script) -> Draft:
            script.lengths.append(len(evidence.sequences[0].tokens))
            return inner(evidence, budget)

        drafter.draft = draft
        done = engine.generate([prompt], params)
        script.text = (*prompt, *done[0].outputs[0].token_ids)
    drafter.draft = inner
    engine.reset()
    return scripts


def rehearse(engine: Engine, scripts: dict[tuple[int, ...], Script], prompt: int) -> None:
    """From now on the engine's drafts earn what the scripts say. prompt: tokens of every prompt."""
    drafter: Any = engine.parts.drafter
    inner, vocab = drafter.draft, engine.parts.target.vocab_size

    def draft(evidence: Any, budget: Any) -> Draft:
        made = inner(evidence, budget)
        if not made.tokens:
            return made
        text = evidence.sequences[0].tokens
        said = scripts[tuple(text[:prompt])].tokens(len(text), len(made.tokens), vocab)
        return replace(made, token=torch.tensor(said), q=None)

    drafter.draft = draft


def eagle_folder(folder: Path, name: str, target: Any) -> Path:
    """The drafter of this shape beside the pair, made if it is not there yet."""
    place = folder / f"eagle-{name}"
    if (place / "config.json").is_file():
        return place
    width, vocabulary = SHAPES[name]
    c, layers = target.config, target.layers
    config = EagleConfig(
        c.hidden // width, c.hidden, (2, layers // 2, layers - 3), c.vocab_size, c.heads // width, c.kv_heads // width,
        c.head_dim, c.inner // width, draft_vocab=0 if vocabulary == 1 else c.vocab_size // vocabulary,
    )  # fmt: skip
    support = None if vocabulary == 1 else torch.arange(0, c.vocab_size, vocabulary)
    network, noise = Eagle3Network(config, support).requires_grad_(False), torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.02, generator=noise)
    network.save(place)
    return place


def eagle_alone(place: Path, target: Any, length: int) -> tuple[int, Callable[[], object]]:
    """Bytes that a level reads, and the forwards of a draft."""
    network = Eagle3Network.load(place, target)
    run, c = forward_of(network, CONTEXT + 32), network.config
    kv = cache_of(run, c, 1)
    taps = [torch.randn(8, target.hidden_size).to(target.dtype) for _ in c.taps]

    def draft() -> None:
        rows = Rows(scored=[KEPT - 1])
        rows.add(0, CONTEXT, [7] * KEPT, range(CONTEXT, CONTEXT + KEPT))
        state = run.forward(rows, kv, taps=taps, tap_rows=range(KEPT))[0][-1:]
        for level in range(length - 1):
            rows = Rows(scored=[0])
            rows.add(0, CONTEXT + KEPT, [7], [CONTEXT + KEPT + level], range(-1, level))
            state = run.forward(rows, kv, feature=state.contiguous())[0]

    return bytes_of(network.layers, network.norm, network.lm_head), draft


def model_alone(engine: Engine, length: int) -> tuple[int, Callable[[], object]]:
    """The same of the engine's draft model."""
    model: Any = engine.parts.drafter.model  # type: ignore[attr-defined]
    one, c = target_pass(model, 1), model.config
    values = c.hidden * (c.layers * (2 * (c.heads + c.kv_heads) * c.head_dim + 3 * c.inner) + c.vocab_size)

    def draft() -> None:
        for _ in range(length):
            one()

    return 2 * values, draft


def measure(folder: Path, length: int, count: int, tokens: int, repeats: int, rounds: int) -> None:
    plain = build_engine(folder / "target-bfloat16", "none", slots=1, max_length=256)
    target: Any = plain.parts.target
    draft_model = companion(plain, str(folder / "draft-bfloat16"), length=length)
    places = {name: eagle_folder(folder, name, target) for name in SHAPES}
    engines = {name: companion(plain, f"eagle:{place}", length=length) for name, place in places.items()}
    noise = torch.Generator().manual_seed(5)
    prompts = [torch.randint(target.vocab_size, (16,), generator=noise).tolist() for _ in range(count)]
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    scripts = write_down(draft_model, prompts, params)
    for engine in (draft_model, *engines.values()):
        rehearse(engine, scripts, 16)
    arms = [Arm("plain", plain), Arm("draft model", draft_model)]
    arms += [Arm(f"EAGLE, {name}", engine) for name, engine in engines.items()]
    found = summarise(run_arms(arms, prompts, params, repeats=repeats), "plain", ["draft model"])

    alone = {"draft model": model_alone(draft_model, length)}
    alone |= {f"EAGLE, {name}": eagle_alone(place, target, length) for name, place in places.items()}
    calls = {name: draft for name, (_, draft) in alone.items()}
    passes = {n: target_pass(target, n) for n in (1, length + 1)}
    spent = in_steps(calls, rounds, time.perf_counter, passes[length + 1])
    spent |= in_steps({f"pass {n}": p for n, p in passes.items()}, rounds, time.perf_counter, passes[1])
    report(found, {name: statistics.median(each) for name, each in spent.items()}, alone, length)


def report(found: list[ArmSummary], spent: dict[str, float], alone: dict[str, Any], length: int) -> None:
    """One line an arm. spent: microseconds of passes and of drafts alone."""
    base = found[0]
    host = 1e6 * base.seconds / base.counts.steps - spent["pass 1"]
    print(f"{torch.get_num_threads()} threads; a pass of the target takes {spent['pass 1']:.0f} us, of {length + 1} rows "
          f"{spent[f'pass {length + 1}']:.0f}; a plain step {host:.0f} besides; {base.tokens_per_second:.1f} tokens/s")  # fmt: skip
    step = {name: spent[f"pass {length + 1}"] + spent[name] + host for name in alone}
    for arm in sorted(found[1:], key=lambda arm: list(alone).index(arm.name)):
        c, plain = arm.counts, arm.speedup
        took, drafting = 1e6 * arm.seconds / c.steps, 1e6 * arm.phases["draft"] / c.steps
        print(f"{arm.name:16}{alone[arm.name][0] / 1e6:6.1f} MB a level  draft {spent[arm.name]:6.0f} us alone, "
              f"{drafting:6.0f} in a step  step {took:6.0f}, predicted {step[arm.name]:6.0f}  "
              f"{c.tokens / c.steps:.2f} tokens a step  over plain {shown(plain)}", end="")  # fmt: skip
        if over := arm.against.get("draft model"):
            print(f"  over the draft model {shown(over)}, predicted {step['draft model'] / step[arm.name]:.3f}", end="")
        print()


def shown(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=Path("500m-0.8"), help=f"a folder, or one of {ROOT}")
    parser.add_argument("--length", type=int, default=4)
    parser.add_argument("--count", type=int, default=8, help="prompts")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="of passes and drafts alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    folder = asked.pair if asked.pair.is_dir() else ROOT / asked.pair
    measure(folder, asked.length, asked.count, asked.tokens, asked.repeats, asked.rounds)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
