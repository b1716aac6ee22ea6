"""Synthetic pairs of realistic size: a deep random target whose later layers add little, its first as the draft.

A benchmark of speed needs a target that fills the memory bus and a draft that agrees with it as often as we want to
study; trained weights are not needed for either. The recipe:

1. a random Llama, seeded;
2. the residual branches (`o_proj`, `down_proj`) of every layer from `k` on scaled by `s`: the smaller `s`, the less
   those layers move the output, the closer the first `k` layers with the same norm and head come to the whole model;
3. the head scaled until the target's distribution has 2.5 nats of entropy on its own samples, as trained models have;
4. the `s` at which the acceptance, 1 - mean TV(p, q) at temperature 1 on the target's own samples, is the wanted one.
   Samples belong to an `s`, so sampling and solving for `s` take turns until a fresh sample confirms the acceptance.

Everything is written as Hugging Face checkpoints that every peer reads, with what was measured beside them::

    runs/synthetic/160m-0.8/search.json                  the turns so far; an interrupted build goes on from them
                            target-bfloat16/  draft-bfloat16/  target-float32/  draft-float32/
                            measured.json                written last: a pair without it is not finished

    python benchmarks/synthetic.py 160m 0.6 0.8 0.9
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from synthetic_files import save, write_json
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from outrider.models.hf.choice import handover_of

ROOT = Path("runs/synthetic")
BRANCHES = ("self_attn.o_proj", "mlp.down_proj")
NATS = 2.5


@dataclass(frozen=True, slots=True)
class Size:
    """Shape of a target and the number of its first layers that make the draft."""

    layers: int
    hidden: int
    heads: int
    inner: int
    vocab: int
    draft_layers: int = 1


SIZES = {
    "tiny": Size(layers=4, hidden=128, heads=4, inner=256, vocab=512),  # to try the machinery; its speed means nothing
    "160m": Size(layers=12, hidden=1024, heads=16, inner=2816, vocab=4096),
    "500m": Size(layers=16, hidden=1536, heads=24, inner=4096, vocab=8192),
}


@dataclass(frozen=True, slots=True)
class Effort:
    """How many of the target's own tokens a measurement looks at: `sequences` x `tokens` after a random prompt."""

    sequences: int = 8
    tokens: int = 64
    prompt: int = 16


@dataclass(frozen=True, slots=True)
class Statistics:
    """Means over positions of the target's own samples at temperature 1.

    entropy: of p, in nats. acceptance: sum min(p, q) = 1 - TV(p, q). agreement: share of equal argmax, the greedy
    acceptance. positions: how many.
    """

    entropy: float
    acceptance: float
    agreement: float
    positions: int


def random_target(size: Size, seed: int) -> LlamaForCausalLM:
    """A float32 Llama with normal weights of standard deviation 0.02, a function of the seed; no end of sequence."""
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        intermediate_size=size.inner,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
        dtype=torch.float32,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").float().eval().requires_grad_(False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffer was emptied too
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02, generator=generator)
    return model


class Tail:
    """The residual branches of layers >= k, at any scale relative to what they were."""

    def __init__(self, model: LlamaForCausalLM, k: int) -> None:
        branches = [layer.get_submodule(name).weight for layer in model.model.layers[k:] for name in BRANCHES]
        self._branches = [(weight, weight.detach().clone()) for weight in branches]

    def scale(self, s: float) -> None:
        """Set the branches to `s` times their first values. Not cumulative."""
        for weight, first in self._branches:
            torch.mul(first, s, out=weight)


def truncate_to_draft(target: LlamaForCausalLM, k: int) -> LlamaForCausalLM:
    """The target's first `k` layers (1 or more) with its embedding, norm and head: its own parameters, no copies."""
    if not 1 <= k <= target.config.num_hidden_layers:
        raise ValueError(f"a draft of {k} layers cannot be cut from {target.config.num_hidden_layers}")
    config = LlamaConfig.from_dict(target.config.to_dict() | {"num_hidden_layers": k})
    config._attn_implementation = target.config._attn_implementation
    with torch.device("meta"):
        draft = LlamaForCausalLM(config)
    draft.model.embed_tokens, draft.model.norm = target.model.embed_tokens, target.model.norm
    draft.model.layers, draft.lm_head = target.model.layers[:k], target.lm_head
    draft.model.rotary_emb = target.model.rotary_emb
    return draft.eval()


def own_samples(
    model: LlamaForCausalLM, prompts: Int[Tensor, "B P"], tokens: int, generator: torch.Generator
) -> Int[Tensor, "B T"]:
    """`prompts`, each followed by `tokens` tokens drawn from the model at temperature 1."""
    way = handover_of(model)
    ids, step, cache = prompts, prompts, way.fresh()
    for _ in range(tokens):
        out = model(step, logits_to_keep=1, **{way.argument: cache}, **way.extra)
        cache = out[way.returned]
        distribution = out.logits[:, -1].float().softmax(-1)
        # Inverse transform in float64: one uniform per token, so nearby models draw nearby samples.
        uniform = torch.rand(len(distribution), 1, generator=generator, dtype=torch.float64)
        step = torch.searchsorted(distribution.double().cumsum(-1), uniform).clamp_(max=distribution.shape[-1] - 1)
        ids = torch.cat([ids, step], dim=1)
    return ids


def scored(model: LlamaForCausalLM, ids: Int[Tensor, "B T"], first: int) -> Float[Tensor, "n V"]:
    """Float32 logits of the distributions that token `first` and its successors were drawn from, all sequences flat."""
    rows = ids.shape[1] - first
    logits = model(ids[:, :-1], use_cache=False, logits_to_keep=rows).logits[:, -rows:]
    return logits.float().flatten(0, 1)


def entropy(logits: Float[Tensor, "n V"]) -> float:
    """Mean entropy of softmax(logits) in nats."""
    logs = logits.log_softmax(-1)
    return float(-(logs.exp() * logs).sum(-1).mean())


def head_factor(logits: Float[Tensor, "n V"], nats: float) -> float:
    """The c for which softmax(c * logits) has a mean entropy of `nats`."""
    if not 0 < nats < torch.tensor(float(logits.shape[-1])).log():
        raise ValueError(f"no distribution over {logits.shape[-1]} tokens has {nats} nats")
    low, high = 1e-3, 1e3
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if entropy(middle * logits) > nats else (low, middle)
    return (low * high) ** 0.5


def statistics(p: Float[Tensor, "n V"], q: Float[Tensor, "n V"]) -> Statistics:
    """Compare the distributions of two models, given as float32 logits at the same positions."""
    return Statistics(
        entropy=entropy(p),
        acceptance=float(torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1).mean()),
        agreement=float((p.argmax(-1) == q.argmax(-1)).float().mean()),
        positions=len(p),
    )


def solve(
    measure: Callable[[float], float], wanted: float, low: float, high: float, tolerance: float, steps: int = 20
) -> float:
    """An x in [low, high] with |measure(x) - wanted| <= tolerance, for a falling `measure`: bracketed false position.

    Illinois' variant (Dowell and Jarratt 1971): an end that stays twice counts half, so both ends close in.
    Raises ValueError if the ends do not bracket `wanted`, or if the steps run out.
    """
    above, below = measure(low) - wanted, measure(high) - wanted
    if not above >= 0 >= below:
        raise ValueError(f"{wanted} lies outside what [{low}, {high}] gives")
    stayed = 0
    for _ in range(steps):
        x = (low * below - high * above) / (below - above)
        error = measure(x) - wanted
        if abs(error) <= tolerance:
            return x
        if error > 0:
            low, above, below = x, error, below / 2 if stayed > 0 else below
        else:
            high, below, above = x, error, above / 2 if stayed < 0 else above
        stayed = 1 if error > 0 else -1
    raise ValueError(f"no {wanted} to within {tolerance} after {steps} steps: raise the tolerance or the effort")


class Pair:
    """A random target and its truncated draft, and the two knobs: the tail's scale and the head's.

    Arithmetic is float32 everywhere; `round` gives the weights the values a bfloat16 checkpoint can hold.
    """

    def __init__(self, size: Size, seed: int = 0) -> None:
        self.target = random_target(size, seed)
        self.draft = truncate_to_draft(self.target, size.draft_layers)
        self._tail = Tail(self.target, size.draft_layers)
        self._first_head = self.target.lm_head.weight.detach().clone()
        self.vocab, self.s, self.head = size.vocab, 1.0, 1.0

    def set(self, s: float, head: float) -> None:
        """Scale tail and head, relative to what they were first."""
        self.s, self.head = s, head
        self._tail.scale(s)
        torch.mul(self._first_head, head, out=self.target.lm_head.weight)

    def random(self, effort: Effort) -> Int[Tensor, "B T"]:
        """Uniform tokens, which is what the untouched target would sample, near enough."""
        shape = (effort.sequences, effort.prompt + effort.tokens)
        return torch.randint(self.vocab, shape, generator=torch.Generator().manual_seed(0))

    def sample(self, effort: Effort, seed: int) -> Int[Tensor, "B T"]:
        """The target's own continuations of random prompts. A seed fixes prompts and uniforms."""
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(self.vocab, (effort.sequences, effort.prompt), generator=generator)
        return own_samples(self.target, prompts, effort.tokens, generator)

    def compare(self, ids: Int[Tensor, "B T"], first: int) -> Statistics:
        """The distributions as they are, at token `first` and its successors."""
        return statistics(scored(self.target, ids, first), scored(self.draft, ids, first))

    def calibrate(self, s: float, ids: Int[Tensor, "B T"], first: int) -> Statistics:
        """Scale the tail by `s`, and the head to NATS on these tokens; compare the distributions there."""
        self.set(s, self.head)
        p, q = scored(self.target, ids, first), scored(self.draft, ids, first)
        factor = head_factor(p, NATS)
        self.set(s, self.head * factor)
        return statistics(factor * p, factor * q)

    def round(self) -> None:
        """Round all weights to bfloat16. They keep their type."""
        for parameter in self.target.parameters():
            parameter.copy_(parameter.bfloat16())


def search(pair: Pair, wanted: float, file: Path, effort: Effort, tolerance: float, turns: int = 6) -> None:
    """Set the pair's knobs for an acceptance of `wanted` on fresh samples. Turns are kept in `file`, and not repeated.

    Raises ValueError when the turns run out.
    """
    done: list[dict[str, float]] = json.loads(file.read_text()) if file.exists() else []
    if done:
        pair.set(done[-1]["s"], done[-1]["head"])
    for turn in range(len(done), turns):
        ids = pair.sample(effort, seed=turn) if turn else pair.random(effort)
        fresh = pair.compare(ids, effort.prompt)
        if turn and abs(fresh.acceptance - wanted) <= tolerance and abs(fresh.entropy - NATS) <= 0.1:
            return
        acceptance = partial(_acceptance, pair, ids, effort.prompt)
        s = solve(acceptance, wanted, 0.0, 1.0 if turn == 0 else min(1.0, 2 * pair.s), tolerance / 3)
        done.append({"s": s, "head": pair.head, "before": fresh.acceptance})
        write_json(file, done)
    raise ValueError(f"no acceptance of {wanted} to within {tolerance} in {turns} turns: raise the effort")


def _acceptance(pair: Pair, ids: Int[Tensor, "B T"], first: int, s: float) -> float:
    return pair.calibrate(s, ids, first).acceptance if s else 1.0  # without a tail the draft is the target


def build(
    name: str,
    size: Size,
    acceptance: float,
    dtypes: Sequence[str] = ("bfloat16",),
    root: Path = ROOT,
    effort: Effort = Effort(),
    tolerance: float = 0.015,
) -> Path:
    """The folder of the pair `name` with this acceptance, built if it is not there yet. Returns the folder.

    Float32 checkpoints hold the same, rounded, numbers as the bfloat16 ones, so both have the same distribution.
    """
    folder = root / f"{name}-{acceptance:g}"
    folder.mkdir(parents=True, exist_ok=True)
    finished = folder / "measured.json"
    done = json.loads(finished.read_text()) if finished.exists() else {}
    recipe = {"size": asdict(size), "acceptance": acceptance, "nats": NATS, "effort": asdict(effort)}
    if done.get("recipe") == recipe and set(dtypes) <= set(done["dtypes"]):
        return folder
    if done and done["recipe"] != recipe:
        raise ValueError(f"{folder} was built with another recipe: remove it to build it anew")
    pair = Pair(size)
    search(pair, acceptance, folder / "search.json", effort, tolerance)
    pair.round()
    unseen = pair.compare(pair.sample(effort, seed=1000), effort.prompt)
    for dtype in dtypes:
        for role, model in (("target", pair.target), ("draft", pair.draft)):
            save(model, folder / f"{role}-{dtype}", dtype, size.vocab)
    parameters = {"target": pair.target.num_parameters(), "draft": pair.draft.num_parameters()}
    result = {"tail": pair.s, "head": pair.head, "measured": asdict(unseen), "parameters": parameters}
    write_json(finished, {"recipe": recipe, "dtypes": sorted({*dtypes, *done.get("dtypes", ())}), **result})
    return folder


def main() -> None:
    """Build the pairs named on the command line and print what was measured."""
    parser = argparse.ArgumentParser(description="build synthetic pairs for benchmarks/peers.py")
    parser.add_argument("size", choices=sorted(SIZES))
    parser.add_argument("acceptance", type=float, nargs="+", help="1 - mean TV at temperature 1, such as 0.8")
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float32"), help="repeatable; else bfloat16")
    parser.add_argument("--root", type=Path, default=ROOT)
    options = parser.parse_args()
    for acceptance in options.acceptance:
        folder = build(options.size, SIZES[options.size], acceptance, options.dtype or ["bfloat16"], options.root)
        print(folder, json.dumps(json.loads((folder / "measured.json").read_text())["measured"]), flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
