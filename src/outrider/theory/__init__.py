"""The theory of speculative decoding, exact: numpy and scipy only, float64, nothing else of Outrider.

A *target* law p is to be sampled with the help of a cheaper *draft* law q. Each module is one concept:

| module | concept |
|---|---|
| `chains` | instances: a pair of nonstationary Markov chains, target and draft |
| `rejections` | how often speculative decoding rejects, what that costs in target calls, and that no simpler rule does better |
| `batch` | several drafts at once: the residual chain, any number of drafts, prefix sharing, trees |
| `exact` | enumerated laws of small instances: the oracles of every other module |
| `simulate` | Monte Carlo of the literal algorithms, with exact values beside it |
| `pareto`, `pareto_chain` | trading bias for speed: optimal residuals and fronts, of one law and along a chain |
| `kl` | the same with Kullback-Leibler budgets, and the optimal policy for whole sequences |
| `lossy` | named lossy rules: exact output law, bias and distance from the front |
| `earth_mover` | how far probability is carried between distributions over codes that have places |
| `multidraft`, `without_replacement` | several candidates at one node: exact rules |
| `transport` | several candidates at one node: the optimal-transport bound, and a plan that reaches it |
| `tuples` | the output law of those rules given the drawn tokens: oracles |
| `block` | block verification: a whole draft judged at once |
| `coupling` | shared randomness instead of acceptance tests |
| `greedy` | temperature zero: certificates that a draft token is accepted |
| `stopping` | when to stop drafting |
| `shrinkage`, `shared_rows` | rates of many sequences estimated together, and draft lengths of each under a shared number of rows |
| `speedup` | from acceptance and cost to speed-up and the best draft length |
| `recurrent` | the same where the target's state cannot be cut: tokens read again after rejections |
| `experts` | mixtures of experts: what a verification touches and costs |
| `hardware`, `roofline` | cost of a forward pass on named hardware |
| `logs`, `replay`, `forecast` | rejections of a pair on data, from logged probabilities, and under another setting |
| `figures` | the figures of the base paper, recomputed |

The base paper is M. Yin, M. Chen, K. Huang, M. Wang, "A Theoretical Perspective for Speculative Decoding Algorithm",
NeurIPS 2024 (arXiv 2411.00841). It writes q for the target and p for the draft; here p is the target and q the draft,
as in Leviathan et al. (ICML 2023), and function arguments are spelled out: `target`, `draft`.

Modules are imported when they are first used:

>>> from outrider import theory
>>> chain = theory.chains.best_guess(states=7, horizon=50, seed=10)
>>> round(theory.rejections.expected_rejections(chain), 4)
16.4049
"""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = (
    "batch",
    "block",
    "chains",
    "coupling",
    "exact",
    "experts",
    "figures",
    "forecast",
    "greedy",
    "hardware",
    "kl",
    "logs",
    "lossy",
    "multidraft",
    "pareto",
    "pareto_chain",
    "recurrent",
    "rejections",
    "replay",
    "roofline",
    "shared_rows",
    "shrinkage",
    "simulate",
    "speedup",
    "stopping",
    "transport",
    "tuples",
    "without_replacement",
)


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_MODULES)
