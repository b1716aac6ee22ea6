"""Do theory and engine agree on the shipped pair? Predictions from plain text beside what the engine then does.

    python benchmarks/agreement.py [--prompts 200] [--tokens 64] [--out runs/agreement] [--quick]

Five parts, each a table of docs/agreement.md and a figure: rejections and tokens per step at lengths 1, 3, 5, 8 and two
temperatures; rejections against position; several drafts under every rule (`several`, `others`); the lossy front, with the base
paper's two residuals.
Prompts are cut from files of the standard library that the pair was not trained on. A wrong rule runs along as a control.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from agreement_report import write

from outrider.build import Engine, build_engine, companion
from outrider.engine.outputs import Result
from outrider.evaluate.scoring import score as predict
from outrider.params import SamplingParams
from outrider.records import Counts
from outrider.telemetry.ledger import ledger
from outrider.theory import forecast, multidraft
from outrider.theory.replay import Text, acceptance
from outrider.theory.transport import optimal_choice
from outrider.train import data
from outrider.verify.lossy import AcceptancePlan, Lossy, OverAcceptance, Position, Spend

LENGTHS = (1, 3, 5, 8)
TEMPERATURES = (0.6, 1.0)
DRAFTS = (1, 2, 4, 8)


def highest_level(p: np.ndarray, q: np.ndarray, drafts: int) -> np.ndarray:
    """The slope of the optimal choice: tokens above it are chosen that many times as often as the draft draws them."""
    return np.divide(optimal_choice(p, q, drafts), q, out=np.zeros_like(q), where=q > 0).max(-1)


SEVERAL = {
    "speculative_sampling": lambda p, q, m: multidraft.recursive(p, q, m).slope,
    "k_seq": lambda p, q, m: multidraft.kseq(p, q, m).slope,
    "optimal_transport": highest_level,
}
"""Rules for several i.i.d. drafts, with their slope s: a first token x is accepted with probability min(1, s q(x) / p(x))."""
BUDGETS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
EPSILONS = (0.1, 0.2, 0.4, 0.8)
HORIZON = 8


@dataclass(frozen=True)
class Setting:
    """What every part shares."""

    engine: Engine
    draft: str
    prompts: list[str]
    tokens: int
    slots: int = 8

    def params(self, temperature: float, n: int = 1) -> SamplingParams:
        return SamplingParams(temperature=temperature, max_tokens=self.tokens, ignore_eos=True, n=n)

    def run(self, temperature: float, seed: int, **changes: Any) -> list[Result]:
        """Every prompt once, with its own seed, through an engine that shares the weights."""
        draft = changes.pop("drafter", self.draft)
        engine = companion(self.engine, draft, slots=self.slots, max_length=512, **changes)
        params = [replace(self.params(temperature), seed=seed * 100_003 + i) for i in range(len(self.prompts))]
        return engine.generate(self.prompts, params)


def held_out_prompts(engine: Engine, count: int, size: int = 48) -> list[str]:
    """`count` pieces of `size` tokens, spread over the held-out files."""
    import sysconfig

    _, held_out = data.split(data.deduplicate(data.find_documents(Path(sysconfig.get_path("stdlib")))))
    pieces = []
    for document in held_out:
        ids = engine.encode(document.text)
        pieces += [ids[i : i + size] for i in range(0, len(ids) - size, 4 * size)]
    pick = np.random.default_rng(7).permutation(len(pieces))[:count]
    return [engine.tokenizer.decode(pieces[i]) for i in sorted(pick)]


def score(s: Setting, temperature: float, samples: int, seed: int, rows: int = 512) -> predict.Scored:
    """`samples` plain texts of every prompt under both models."""
    items, params, clock = [predict.Item(p) for p in s.prompts], s.params(temperature, samples), predict.Clock()
    emitted = predict.sample(s.engine, items, params, clock, lambda x: None, batch=s.slots, seed=seed)
    draft = predict.draft_model(s.engine)
    return predict.score(s.engine, draft, emitted, items, params, clock, lambda x: None, rows=rows, seed=seed)


def sums(results: Sequence[Result]) -> Counts:
    total = Counts()
    for result in results:
        total.merge(result.outputs[0].counts)
    return total


# ------------------------------------------------------------------------------------------- lengths and temperatures
class Wrong(Lossy):
    """The control: tosses a coin that is too generous, and books the rejection probability of the exact rule."""

    def __init__(self) -> None:
        super().__init__("wrong", Generous())

    def __call__(self, p: Any, draft: Any, noise: Any, allowance: Any = None) -> Any:
        did, rows = super().__call__(p, draft, noise, allowance), draft.parent_rows
        risk = []
        for b, judged in enumerate(did.judged):
            nodes = range(draft.offsets[b], draft.offsets[b] + judged)
            risk.append(sum(1.0 - float(torch.minimum(p[rows[k]], draft.q.probs[draft.q.row[k]]).sum()) for k in nodes))
        return replace(did, risk=tuple(risk), bias=(0.0,) * len(risk))


class Generous:
    def __call__(self, position: Position) -> AcceptancePlan:
        return OverAcceptance(0.08)(position)


def lengths(s: Setting) -> list[dict[str, Any]]:
    rows = []
    for temperature in TEMPERATURES:
        texts = score(s, temperature, 2, seed=11).texts
        for length in LENGTHS:
            honest = s.run(temperature, 21 + length, length=length, rule="speculative_sampling")
            rows.append(one_length(s, texts, honest, temperature, length, "speculative_sampling"))
        liar = s.run(temperature, 77, length=3, rule=Wrong(), allow_lossy=True)
        rows.append(one_length(s, texts, liar, temperature, 3, "control: too generous by 0.08"))
    return rows


def one_length(
    s: Setting, texts: list[Text], results: list[Result], temperature: float, length: int, rule: str
) -> dict[str, Any]:
    counts = sums(results)
    tokens = sum(len(r.outputs[0].token_ids) for r in results)
    said = forecast.compare(texts, length, counts.rejected, tokens, len(s.prompts), same_prompts=True, level=0.95)
    replayed = forecast.replay(texts, length)
    steps = np.array([r.outputs[0].counts.steps for r in results], dtype=float)
    per_step = tokens_per_step(replayed, steps, s.tokens)
    return {
        "temperature": temperature,
        "length": length,
        "rule": rule,
        "rejections": {
            "predicted": said.predicted,
            "low": said.low,
            "high": said.high,
            "observed": counts.rejected,
            "agrees": said.agrees,
        },
        "tokens_per_step": per_step,
        "ledger": {"predicted": counts.risk, "observed": counts.rejected, "agrees": ledger(counts).agrees},
    }


def tokens_per_step(replayed: Any, steps: np.ndarray, tokens: int, level: float = 1.96) -> dict[str, Any]:
    """Tokens per target call: predicted from two texts a prompt, observed on one, and the 95% interval of the observed.

    Same prompts on both sides, so only texts of one prompt differ: the spread between the two texts of the logs, and the exact
    variance of the coins given a text.
    """
    calls = replayed.calls.reshape(len(steps), -1)
    predicted = calls.mean(1)
    within = float(((calls - predicted[:, None]) ** 2).sum() / calls.shape[0] / (calls.shape[1] - 1))
    coins = float(replayed.calls_variance.mean())
    margin = level * np.sqrt((within * (1 + 1 / calls.shape[1]) + coins) * len(steps))
    total = predicted.sum()
    return {
        "predicted": len(steps) * tokens / total,
        "low": len(steps) * tokens / (total + margin),
        "high": len(steps) * tokens / (total - margin),
        "observed": len(steps) * tokens / steps.sum(),
        "agrees": bool(abs(steps.sum() - total) <= margin),
    }


# --------------------------------------------------------------------------------------------------- along the text
def positions(s: Setting) -> dict[str, Any]:
    """Cumulated rejections by position at length HORIZON: expected from the logs, and counted."""
    texts = score(s, 1.0, 2, seed=31).texts
    expected = np.mean([corrected(acceptance(t), HORIZON) for t in texts], axis=0).cumsum()
    results = s.run(1.0, 41, length=HORIZON, rule="speculative_sampling")
    seen = np.array([[o == "corrected" for o in r.outputs[0].origins] for r in results], dtype=float)
    error = seen.cumsum(1).std(0, ddof=1) / np.sqrt(len(seen))
    bound = np.cumsum(np.mean([t.tv for t in texts], axis=0))
    return {
        "length": HORIZON,
        "expected": expected.tolist(),
        "observed": seen.cumsum(1).mean(0).tolist(),
        "error": error.tolist(),
        "bound": bound.tolist(),
    }


def corrected(accept: np.ndarray, length: int) -> np.ndarray:
    """P(token n is a correction), given the text: the state is how many drafts of the step have been accepted."""
    state, out = np.zeros(length + 1), np.zeros(len(accept))
    state[0] = 1.0
    for n in range(1, len(accept)):  # the first token comes with the prompt
        refused = state[:length].sum() * (1.0 - accept[n])
        out[n] = refused
        state = np.concatenate([[refused + state[length]], state[:length] * accept[n]])
    return out


# --------------------------------------------------------------------------------------------------- several drafts
def several(s: Setting) -> list[dict[str, Any]]:
    scored = score(s, 1.0, 2, seed=51, rows=1 << 24)  # every distribution of every text
    out = []
    for m in DRAFTS:
        arms = [(rule, f"batch:{m}") for rule in SEVERAL]
        arms += [(rule, f"shared:{m}") for rule in SEVERAL]
        arms += [("speculative_sampling", f"tree:{m}x1x1")]
        for rule, shape in arms if m > 1 else [("speculative_sampling", "chain"), ("block", "chain")]:
            out.append(one_arm(s, m, rule, shape, scored))
    return out


def others(s: Setting) -> list[dict[str, Any]]:
    """Rules whose coins are not known from the text alone, or that need drafts of their own: the ledger predicts."""
    arms = [(1, "match", "chain"), (1, "traversal", "chain"), (2, "spechub", "hub:2x1x1"), (2, "spechub", "hub:2x2x2")]
    arms += [
        (m, "traversal", f"{kind}:{m}{rest}") for m in DRAFTS[1:] for kind, rest in (("batch", ""), ("tree", "x1x1"))
    ]
    return [one_arm(s, *arm, None) for arm in arms]


def one_arm(s: Setting, m: int, rule: str, shape: str, scored: predict.Scored | None) -> dict[str, Any]:
    """One run; predicted before it from the distributions of the text if they are given and the rule's coins follow from them."""
    drafter = s.draft if shape == "chain" else f"{shape}:{s.draft}"
    results = s.run(1.0, 61, length=3, rule=rule, drafter=drafter)
    counts = sums(results)
    book = ledger(counts, 0.05)
    known = scored is not None and rule != "block" and shape.startswith(("chain", "batch"))
    return {
        "drafts": m,
        "rule": rule,
        "shape": shape,
        "tokens_per_step": counts.emitted / counts.steps,
        "first_accepted": counts.accepted_at[0] / counts.judged_at[0],
        "before": predicted_batch(s, scored, results, rule, m) if known and scored is not None else None,
        "predicted": book.predicted,
        "observed": book.observed,
        "low": book.low,
        "high": book.high,
        "agrees": book.agrees,
    }


def predicted_batch(s: Setting, scored: predict.Scored, results: Sequence[Result], rule: str, m: int) -> dict[str, Any]:
    """Tokens per step and first acceptance of m drafts that compete for the first position, from plain text alone.

    Given its token x, a first position was accepted with probability min(1, s q(x)/p(x)), s the slope of the rule at that
    distribution (`SEVERAL`), and a later one with min(1, q(x)/p(x)): the replay recursion with two kinds of coins.
    """
    slope = SEVERAL[rule](scored.target_rows, scored.draft_rows, m)
    rng, calls, spread, first, seen = np.random.default_rng(3), [], [], 0.0, 0.0
    at = 0
    for text in scored.texts:
        ratio = np.exp(text.draft - text.target)
        root, deep = np.minimum(1.0, slope[at : at + len(text)] * ratio), np.minimum(1.0, ratio)
        at += len(text)
        drawn, judged, taken = steps_of(root, deep, 3, rng.random((200, len(text))))
        calls.append(drawn.mean())
        spread.append(drawn.var(ddof=1))
        first, seen = first + taken, seen + judged
    steps = np.array([r.outputs[0].counts.steps for r in results], dtype=float)
    pairs = np.array(calls).reshape(len(steps), -1)
    within = float(((pairs - pairs.mean(1)[:, None]) ** 2).sum() / pairs.shape[0] / (pairs.shape[1] - 1))
    margin = 1.96 * np.sqrt((within * (1 + 1 / pairs.shape[1]) + float(np.mean(spread))) * len(steps))
    total, tokens = pairs.mean(1).sum(), len(steps) * s.tokens
    return {
        "tokens_per_step": tokens / total,
        "low": tokens / (total + margin),
        "high": tokens / (total - margin),
        "agrees": bool(abs(steps.sum() - total) <= margin),
        "first_accepted": first / seen,
    }


def steps_of(root: np.ndarray, deep: np.ndarray, length: int, coins: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Target calls of every row of coins along one text; first positions judged and accepted in all rows together."""
    place, calls = np.zeros(len(coins), int), np.ones(len(coins))  # the prompt's call gives the first token
    judged = taken = 0
    for n in range(1, len(root)):
        fresh, bonus = place == 0, place == length
        kept = (coins[:, n] < np.where(fresh, root[n], deep[n])) & ~bonus
        if n == len(root) - 1:  # the last token a text may have is never a judged draft
            calls += fresh
            break
        calls += fresh
        judged, taken = judged + int(fresh.sum()), taken + int((fresh & kept).sum())
        place = np.where(kept, place + 1, 0)
    return calls, judged, taken


# --------------------------------------------------------------------------------------------------- the lossy front
@dataclass(frozen=True)
class Uno:
    """The base paper's arm with the target as residual ("UNO"): the same test, a worse correction."""

    eps: float

    def __call__(self, position: Position) -> AcceptancePlan:
        accept = OverAcceptance(self.eps)(position).accept
        refused = 1.0 - float((accept * position.q).sum())
        return AcceptancePlan(accept, position.p * refused)


def front(s: Setting) -> dict[str, Any]:
    texts = score(s, 1.0, 2, seed=71).texts
    points = []
    for budget in BUDGETS:
        rule = Lossy("tv_budget", Spend(), budget)
        points.append(one_point(s, rule, {"budget": budget}))
        points[-1]["predicted"] = float(
            np.mean(np.concatenate([np.maximum(np.asarray(t.tv) - budget, 0) for t in texts]))
        )
    arms = []
    for eps in EPSILONS:
        for name, kind in (("optimal residual", OverAcceptance), ("target as residual", Uno)):
            arms.append(one_point(s, Lossy("over_acceptance", kind(eps)), {"eps": eps, "residual": name}))
    return {"tv": float(np.mean(np.concatenate([np.asarray(t.tv) for t in texts]))), "points": points, "arms": arms}


def one_point(s: Setting, rule: Lossy, what: dict[str, Any]) -> dict[str, Any]:
    """Rejections and bias per judged position with their errors over prompts, and the log-likelihood of the text."""
    results = s.run(1.0, 81, length=3, rule=rule, allow_lossy=True)
    judged = np.array([r.outputs[0].counts.judged for r in results], dtype=float)
    rejected = np.array([r.outputs[0].counts.rejected for r in results], dtype=float)
    bias = np.array([r.outputs[0].counts.bias for r in results])
    book = ledger(sums(results), 0.05)
    rate = rejected.sum() / judged.sum()
    error = np.sqrt(((rejected - rate * judged) ** 2).sum()) / judged.sum()
    return {
        **what,
        "rejection": rate,
        "error": float(error),
        "bias": float(bias.sum() / judged.sum()),
        "ledger": {"predicted": book.predicted, "observed": book.observed, "agrees": book.agrees},
        "log_likelihood": likelihood(s, results),
    }


def likelihood(s: Setting, results: Sequence[Result]) -> dict[str, float]:
    """Mean log-probability in nats per token of the texts under the target, and its error over prompts."""
    target, clock = s.engine.parts.target, predict.Clock()
    means = []
    for r in results:
        tokens, output = [*r.prompt, *r.outputs[0].token_ids], r.outputs[0].token_ids
        rows = torch.cat(list(predict.logits_along(target, tokens, len(r.prompt) - 1, clock)))
        means.append(float(rows.float().log_softmax(-1).gather(1, torch.tensor(output)[:, None]).mean()))
    return {"mean": float(np.mean(means)), "error": float(np.std(means, ddof=1) / np.sqrt(len(means)))}


PARTS = {"lengths": lengths, "positions": positions, "several": several, "others": others, "front": front}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/agreement"))
    parser.add_argument("--report", action="store_true", help="only write the page again from the numbers on disk")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        engine = build_engine(max_length=512)
        path = str(engine.loaded.path).removesuffix("target") + "draft"
        s = Setting(engine, path, held_out_prompts(engine, args.prompts), args.tokens)
        for name in args.parts:
            (args.out / f"{name}.json").write_text(json.dumps(PARTS[name](s), indent=1))
            print(f"{name}: done", flush=True)
    if set(PARTS) <= {path.stem for path in args.out.glob("*.json")}:
        write(args.out)
    else:
        print("docs/agreement.md holds all parts: run the others too")


if __name__ == "__main__":
    main()
