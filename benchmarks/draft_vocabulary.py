"""A draft model with a part of its vocabulary beside the whole one, on a synthetic pair with 131,072 tokens.

    python benchmarks/draft_vocabulary.py build                       # 0.7 GB in runs/synthetic/128k
    python benchmarks/draft_vocabulary.py measure --vocabulary auto --vocabulary 16384

The pair is a random Llama and its first layer (see synthetic.py) whose tokens have frequencies as words have: one unit of the
residual stream is the same everywhere, untouched by all layers, and the head weighs it by the logarithm of Zipf's frequencies,
shuffled over the ids. So some thousand tokens make up most of what the target writes, as with trained models.

`measure` decodes plainly, with the whole head and with restricted ones in turns; it prints what was predicted beside what came out.
Its texts begin as those that rank the tokens, with pieces of Python (other ones), or with drawn tokens (`--prompts drawn`): what is
predicted of a part of the vocabulary holds for text like that which ranked the tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from jaxtyping import Float
from synthetic import (
    ROOT,
    Effort,
    Size,
    Tail,
    entropy,
    own_samples,
    random_target,
    scored,
    statistics,
    truncate_to_draft,
)  # fmt: skip
from synthetic_files import save, write_json
from torch import Tensor
from transformers import LlamaForCausalLM

from outrider.assets import shipped_prompts
from outrider.build import Engine, build_engine, companion
from outrider.evaluate.measure import Arm, run_arms
from outrider.evaluate.records import ArmSummary, summarise
from outrider.models.restricted import Restricted
from outrider.models.token_use import PROMPT
from outrider.params import SamplingParams

SIZE = Size(layers=16, hidden=512, heads=8, inner=1408, vocab=131072)
CONSTANT = 0.06
"""The unit that is the same everywhere; the others of an embedding are about 0.02."""
EXPONENT, NATS = 1.2, 2.5
"""Of Zipf's law, and the entropy of the target's distributions."""
EFFORT = Effort(sequences=4, tokens=24, prompt=8)


def build(folder: Path, acceptance: float, size: Size = SIZE, effort: Effort = EFFORT) -> dict[str, float]:
    """Write the pair with about this acceptance, and what was measured of it."""
    target = random_target(size, 0)
    target.model.embed_tokens.weight[:, 0] = CONSTANT
    for layer in target.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    draft, tail = truncate_to_draft(target, size.draft_layers), Tail(target, size.draft_layers)
    first, noise = target.lm_head.weight.clone(), torch.Generator().manual_seed(2)
    first[:, 0] = 0.0
    prior = -EXPONENT * torch.log1p(torch.randperm(size.vocab, generator=noise).float())
    ids = torch.randint(size.vocab, (effort.sequences, effort.prompt + effort.tokens), generator=noise)
    for _ in range(2):  # samples belong to a pair: a second turn on the target's own
        low, high = 1e-2, 1.0
        for _ in range(5):
            scale = (low * high) ** 0.5
            tail.scale(scale)
            fit_head(target, first, prior, ids, effort.prompt)
            found = statistics(scored(target, ids, effort.prompt), scored(draft, ids, effort.prompt))
            low, high = (scale, high) if found.acceptance > acceptance else (low, scale)
        ids = own_samples(target, ids[:, : effort.prompt], effort.tokens, noise)
    for parameter in target.parameters():
        parameter.copy_(parameter.bfloat16())
    found = statistics(scored(target, ids, effort.prompt), scored(draft, ids, effort.prompt))
    for role, part in (("target", target), ("draft", draft)):
        save(part, folder / f"{role}-bfloat16", "bfloat16", size.vocab)
    measured = {"tail": scale, "entropy": found.entropy, "acceptance": found.acceptance, "agreement": found.agreement}
    write_json(folder / "measured.json", measured)
    return measured


def fit_head(target: LlamaForCausalLM, first: Tensor, prior: Tensor, ids: Tensor, prompt: int) -> None:
    """Give the target's head the prior, and the scale that makes its distributions of NATS."""
    head = target.lm_head.weight
    head.copy_(first)
    constant = target.model(ids).last_hidden_state[..., 0].mean()
    head.mul_(scale_for(scored(target, ids, prompt), prior))
    head[:, 0] = prior / constant


def scale_for(logits: Float[Tensor, "n V"], prior: Float[Tensor, "V"], nats: float = NATS) -> float:
    """The c for which softmax(c * logits + prior) has a mean entropy of `nats`."""
    low, high = 0.1, 100.0
    for _ in range(16):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if entropy(middle * logits + prior) > nats else (low, middle)
    return (low * high) ** 0.5


def prompts_of(kind: str, engine: Engine, count: int) -> list[list[int]]:
    """Beginnings of texts: what follows the pieces of code that rank tokens, or drawn tokens."""
    if kind == "drawn":
        noise = torch.Generator().manual_seed(3)
        return [torch.randint(engine.parts.target.vocab_size, (16,), generator=noise).tolist() for _ in range(count)]
    texts = [engine.encode(prompt) for prompt in shipped_prompts()]
    return [t[PROMPT : PROMPT + 16] for t in texts if len(t) >= PROMPT + 16][:count]


def measure(
    folder: Path, kind: str, vocabularies: list[str], length: int, count: int, tokens: int, repeats: int
) -> None:
    """Decode with every vocabulary in turns; the whole head is the base."""
    engine = build_engine(folder / "target-bfloat16", "none", slots=1, max_length=256)
    draft, texts = str(folder / "draft-bfloat16"), prompts_of(kind, engine, count)
    whole = companion(engine, draft, length=length)
    arms = [Arm("whole head", whole), Arm("plain", engine)]
    arms += [Arm(f"vocabulary {v}", companion(whole, draft_vocabulary=v)) for v in vocabularies]
    for temperature in (1.0, 0.0):
        params = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True)
        records = run_arms(arms, texts, params, repeats=repeats)
        for row in summarise(records, arms[0].name):
            print(line(temperature, row))
    for arm in arms[2:]:
        model = getattr(arm.engine.parts.drafter, "model", None)
        told = model.predicted if isinstance(model, Restricted) else None
        print(f"{arm.name}: " + ("all tokens are kept" if told is None else told.sentence("it")))


def line(temperature: float, row: ArmSummary) -> str:
    """What came out of an arm: the same that is predicted, as it was measured."""
    c, r = row.counts, row.speedup
    drafted = "" if not c.judged else (
        f"  acceptance {c.accepted / c.judged:.3f}  {c.tokens / c.steps:.2f} tokens a step"
        f"  {1e3 * row.phases['draft'] / max(1, c.proposed):.2f} ms a drafted token,"
        f" {1e3 * (row.seconds - row.phases['draft']) / c.steps:.2f} ms a step besides"
    )  # fmt: skip
    ratio = "" if r is None else f"  {r.value:.2f} ({r.low:.2f} to {r.high:.2f}) of the whole head"
    return f"T={temperature:g}  {row.name:20} {row.tokens_per_second:6.1f} tokens/s{drafted}{ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "measure"))
    parser.add_argument("--folder", type=Path, default=ROOT / "128k")
    parser.add_argument("--acceptance", type=float, default=0.75, help="of the pair that is built, about")
    parser.add_argument("--vocabulary", action="append", help="a number of tokens or auto; repeatable, default auto")
    parser.add_argument("--prompts", choices=("code", "drawn"), default="code")
    parser.add_argument("--length", type=int, default=3)
    parser.add_argument("--count", type=int, default=4, help="texts")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args()
    if asked.what == "build":
        with torch.no_grad():
            print(json.dumps(build(asked.folder, asked.acceptance)))
        return
    measure(
        asked.folder,
        asked.prompts,
        asked.vocabulary or ["auto"],
        asked.length,
        asked.count,
        asked.tokens,
        asked.repeats,
    )


if __name__ == "__main__":
    main()
