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
from agreement_setting import Setting, held_out_prompts, score, sums
from agreement_several import others, several

from outrider.build import build_engine
from outrider.engine.outputs import Result
from outrider.evaluate.scoring import score as predict
from outrider.telemetry.ledger import ledger
from outrider.theory import forecast
from outrider.theory.replay import Text, acceptance
from outrider.verify.lossy import AcceptancePlan, Lossy, OverAcceptance, Position, Spend

LENGTHS = (1, 3, 5, 8)
TEMPERATURES = (0.6, 1.0)
BUDGETS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
EPSILONS = (0.1, 0.2, 0.4, 0.8)
HORIZON = 8


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
