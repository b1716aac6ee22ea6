"""What an engine must hold, as checks that raise: the mutants of `test_engine_mutants.py` are each killed by one of them."""

from __future__ import annotations

import math
from functools import cache

import torch

from outrider.build import Engine
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.none import NoDraft
from outrider.params import SamplingParams
from outrider.types import Draft, Rows
from outrider.verify import load_rule
from tests.contract.asked import PROMPTS, VOCAB, engine, params, target
from tests.contract.drafters import DRAFTERS
from tests.contract.scripted import Budgets, Scripted

MODEL = target()
PATIENCE = 600
"""Steps after which an engine that still has work counts as hung; one without a mistake needs about 150."""


def finish(one: Engine, got: dict[str, list[int]]) -> None:
    for _ in range(PATIENCE):
        if not one.busy:
            return
        for event in one.step():
            got.setdefault(event.request, []).extend(event.tokens)
    raise AssertionError("the engine still has work and makes no progress")


@cache
def plain(sampling: str) -> list[list[int]]:
    """The reference: one request at a time, nothing proposed. Filled before any mistake is planted."""
    out = []
    for prompt, p in zip(PROMPTS, params(sampling), strict=True):
        one = engine(MODEL, NoDraft(), load_rule("match"), 1)
        out.append(list(one.generate([prompt], [p])[0].outputs[0].token_ids))
    return out


def oracle(sampling: str) -> Scripted:
    """Proposes the text of plain decoding: every draft is accepted whole, so deep rows are what decides."""
    text = {tuple(prompt): out for prompt, out in zip(PROMPTS, plain(sampling), strict=True)}

    def script(view, k: int) -> list[int]:
        done = len(view.tokens) - view.prompt
        return text[tuple(view.tokens[: view.prompt])][done : done + k]

    return Scripted(script)


# ------------------------------------------------------------------------------------------------------ the checks
def strings() -> None:
    """Text of plain decoding for every kind of drafter, three at a time, with penalties, bans and early ends; sums add up."""
    for name in ("ngram", "tree-coupled", "oracle"):
        for sampling in ("top-p with penalties", "bans and minimum", "greedy with penalties"):
            drafter = oracle(sampling) if name == "oracle" else DRAFTERS[name](MODEL, 3)
            one = engine(MODEL, drafter, load_rule("match"), 3)
            names = [one.submit(prompt, p) for prompt, p in zip(PROMPTS, params(sampling), strict=True)]
            got: dict[str, list[int]] = {}
            finish(one, got)
            assert [got[n] for n in names] == plain(sampling)
            counts = one.counts
            assert counts.emitted == sum(map(len, got.values())) == counts.accepted + counts.steps - counts.cut
            assert counts.judged == counts.accepted + counts.dropped + counts.rejected <= counts.proposed


def churn() -> None:
    """Joins, preemptions and aborts in the middle of speculation: slots owned once, caches in step, survivors' text unmoved."""
    one = engine(MODEL, DRAFTERS["model-coupled"](MODEL, 2), load_rule("match"), 2)
    chosen = params("top-p with penalties")
    names = [one.submit(prompt, p) for prompt, p in zip(PROMPTS, chosen, strict=True)]
    got: dict[str, list[int]] = {}
    victim = ""
    for turn in range(PATIENCE):
        if not one.busy:
            break
        for event in one.step():
            got.setdefault(event.request, []).extend(event.tokens)
        if turn % 5 == 2:
            one.preempt(one.scheduler.running[0].request if one.scheduler.running else "")
        if turn == 3:  # back to the queue, and dropped from there
            victim = one.scheduler.running[-1].request
            one.preempt(victim)
            assert one.abort(victim)
        owned = [s.slot for s in one.scheduler.running]
        assert len(owned) == len(set(owned)) and len(owned) + one.scheduler.free == 2
        for slot in {0, 1} - set(owned):
            assert one.parts.kv.length[slot] == 0
        for s in one.scheduler.running:
            assert one.parts.kv.length[s.slot] == s.cached < len(s.tokens)
    assert not one.busy
    kept = [i for i in range(len(PROMPTS)) if names[i] != victim]
    assert [got[names[i]] for i in kept] == [plain("top-p with penalties")[i] for i in kept]


def caches() -> None:
    """EX-8: after every step of a tree drafter with varying depth, keys and values are those of a fresh run."""
    one = Engine(
        MODEL,
        DRAFTERS["tree-iid"](MODEL, 3),
        load_rule("speculative_sampling"),
        Budgets(lambda s: len(s.tokens) % 4),
        slots=3,
        max_length=64,
        chunk=5,
    )
    for prompt, p in zip(PROMPTS[:4], params("temperature 1"), strict=False):
        one.submit(prompt, p)
    for _ in range(PATIENCE):
        if not one.busy:
            return
        one.step()
        for s in one.scheduler.running:
            if s.cached:
                kv = MODEL.new_kv(1, s.cached + 1)
                MODEL.forward(Rows.assemble([0], [s.tokens[: s.cached]], [0], Draft.empty(0), [False]), kv)
                assert torch.allclose(one.parts.kv.entries(s.slot, s.cached)[0], kv.entries(0, s.cached)[0], atol=1e-9)
    raise AssertionError("the engine still has work and makes no progress")


def itself() -> None:
    """A model that drafts for itself is never rejected, and proposes as much as asked, also after others left its slot."""
    one = engine(MODEL, ModelDrafter(MODEL, depth=4), load_rule("speculative_sampling"), 2, eos=())
    names = [one.submit([1 + i % 5, 2], SamplingParams(temperature=1.0, max_tokens=9 + i, seed=i)) for i in range(8)]
    for turn in range(30):
        one.step()
        if turn % 3 == 1:
            one.preempt(one.scheduler.running[0].request if one.scheduler.running else names[-1])
    finish(one, {})
    assert one.counts.rejected == 0
    assert one.counts.risk < 1e-9
    assert one.counts.accepted > 0.5 * one.counts.emitted


def ends() -> None:
    """EX-7: nothing after an end of sequence, and never more than was asked for, inside accepted runs."""
    free = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    text = engine(MODEL, NoDraft(), load_rule("match"), 1).generate([PROMPTS[0]], free)[0].outputs[0].token_ids
    script = Scripted(lambda v, k: list(text[len(v.tokens) - v.prompt :][:k]))
    for length in range(1, 9):
        limited = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        one = engine(MODEL, script, load_rule("speculative_sampling"), 1)
        output = one.generate([PROMPTS[0]], limited)[0].outputs[0]
        assert (output.token_ids, output.finish_reason) == (text[:length], "length")
        assert one.counts.proposed <= max(0, length - 2)  # the last token is the target's own
        stop = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop_token_ids=(text[length - 1],))
        output = engine(MODEL, script, load_rule("match"), 1).generate([PROMPTS[0]], stop)[0].outputs[0]
        first = text.index(text[length - 1]) + 1
        assert (output.token_ids, output.finish_reason) == (text[:first], "stop")


def bad_drafts() -> None:
    """A drafter that proposes tokens which do not exist, and distributions of NaN: the text is the target's, the incident is
    counted."""
    wanted = plain("greedy with penalties")
    nan = Scripted(
        lambda v, k: [2] * k, distribution=lambda n: torch.full((n, VOCAB), float("nan"), dtype=torch.float64)
    )
    for script in (Scripted(lambda v, k: [VOCAB + 5, 1, 2][:k]), Scripted(lambda v, k: [3, -1][:k]), nan):
        one = engine(MODEL, script, load_rule("speculative_sampling"), 3)
        names = [one.submit(prompt, p) for prompt, p in zip(PROMPTS, params("greedy with penalties"), strict=True)]
        got: dict[str, list[int]] = {}
        finish(one, got)
        assert [got[n] for n in names] == wanted
        assert one.defects > 0
    one = engine(MODEL, nan, load_rule("speculative_sampling"), 3)
    one.generate(PROMPTS, params("temperature 1"))
    assert math.isfinite(one.counts.risk)


def settings() -> None:
    """The target's own distribution answers to each request's own parameters: hot and cold requests side by side, and a sharp
    cut."""
    one = engine(MODEL, DRAFTERS["model-coupled"](MODEL, 3), load_rule("match"), 3)
    mixed = [
        params("greedy")[0],
        params("cold, top-k")[1],
        params("min-p, bias, repetition")[2],
        params("temperature 1")[3],
        params("top-p with penalties")[4],
    ]
    names = [one.submit(prompt, p) for prompt, p in zip(PROMPTS, mixed, strict=False)]
    got: dict[str, list[int]] = {}
    finish(one, got)
    kinds = ("greedy", "cold, top-k", "min-p, bias, repetition", "temperature 1", "top-p with penalties")
    assert [got[n] for n in names] == [plain(kind)[i] for i, kind in enumerate(kinds)]


CHECKS = (strings, churn, caches, itself, ends, bad_drafts, settings)
