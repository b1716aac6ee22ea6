"""EX-11 for the engine: mistakes planted in the step, the scheduler, the sequence, the cache and the laws are each killed.

A mistake is one line of source, replaced; the module is compiled again with it and its functions take the place of the honest
ones for the length of a test. `tests/law/test_mutants.py` does the same for the rules and the noise.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch

from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.none import NoDraft
from outrider.engine.core import Engine
from outrider.errors import OutriderError
from outrider.params import SamplingParams
from outrider.types import Draft, Rows
from outrider.verify import load_rule
from tests.contract.asked import PROMPTS, SAMPLING, VOCAB, engine, params, target
from tests.contract.drafters import DRAFTERS
from tests.contract.scripted import Budgets, Scripted

MODEL = target()
PATIENCE = 600
"""Steps after which an engine that still has work counts as hung; an honest one needs about 150."""


def finish(one: Engine, got: dict[str, list[int]]) -> None:
    for _ in range(PATIENCE):
        if not one.busy:
            return
        for event in one.step():
            got.setdefault(event.request, []).extend(event.tokens)
    raise AssertionError("the engine still has work and makes no progress")


@cache
def plain(sampling: str) -> list[list[int]]:
    """The honest reference: one request at a time, nothing proposed. Filled before any mistake is planted."""
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
                assert torch.allclose(one.parts.kv.k[:, s.slot, :, : s.cached], kv.k[:, 0, :, : s.cached], atol=1e-9)
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


def guards() -> None:
    """A drafter that proposes tokens which do not exist, and laws of NaN: the text is the target's, the incident is counted."""
    wanted = plain("greedy with penalties")
    nan = Scripted(lambda v, k: [2] * k, law=lambda n: torch.full((n, VOCAB), float("nan"), dtype=torch.float64))
    for script in (Scripted(lambda v, k: [VOCAB + 5, 1, 2][:k]), Scripted(lambda v, k: [3, -1][:k]), nan):
        one = engine(MODEL, script, load_rule("speculative_sampling"), 3)
        names = [one.submit(prompt, p) for prompt, p in zip(PROMPTS, params("greedy with penalties"), strict=True)]
        got: dict[str, list[int]] = {}
        finish(one, got)
        assert [got[n] for n in names] == wanted
        assert one.incidents > 0
    one = engine(MODEL, nan, load_rule("speculative_sampling"), 3)
    one.generate(PROMPTS, params("temperature 1"))
    assert math.isfinite(one.counts.risk)


def settings() -> None:
    """The target's own law answers to each request's own parameters: hot and cold requests side by side, and a sharp cut."""
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


CHECKS = (strings, churn, caches, itself, ends, guards, settings)

# ----------------------------------------------------------------------------------------------------- the mistakes
STEP, ENGINE, SCHEDULER, SEQUENCE, EMISSION = (
    f"outrider.engine.{name}" for name in ("step", "engine", "scheduler", "sequence", "emission")
)
TYPES, KV, TOY, LAW = "outrider.types", "outrider.nn.kv", "outrider.models.toy", "outrider.sampling.pipeline"
CATCHUP, HISTORY, GUARD = "outrider.drafters.model.token_cache", "outrider.sampling.history", "outrider.engine.sanitize"
MUTANTS = [  # name, module, text, mistake, the check that kills it
    ("row laws: a node forgets its ancestors", STEP, "in draft.sequence_of_row], draft.path_tokens", "in draft.sequence_of_row], tuple(p[-1:] for p in draft.path_tokens)", strings),
    ("row laws: a node counts itself as unseen", STEP, "in draft.sequence_of_row], draft.path_tokens", "in draft.sequence_of_row], tuple(p[:-1] for p in draft.path_tokens)", strings),
    ("row laws: a node borrows the first sequence's parameters", STEP, "[views[b] for b in draft.sequence_of_row]", "[views[b if i < len(views) else 0] for i, b in enumerate(draft.sequence_of_row)]", settings),
    ("paths: numbers of the draft instead of the segment", STEP, "draft.local(b, k) for k", "k for k", strings),
    ("paths: a prompt chunk eats a verdict", STEP, "            paths.append([])\n            continue", "            paths.append([])", strings),
    ("noise: the drafter's is one position late", STEP, "len(v.tokens) - 1 for v in views))\n    limit", "len(v.tokens) for v in views))\n    limit", strings),
    ("verdict: order of accepted and corrected", EMISSION, "[draft.tokens[k] for k in path] + [verdict.next_token[b]]\n    last", "[verdict.next_token[b]] + [draft.tokens[k] for k in path]\n    last", strings),
    ("verdict: a neighbour's next token", EMISSION, "[verdict.next_token[b]]\n    last", "[verdict.next_token[0]]\n    last", strings),
    ("verdict: prompt chunks shift the sequences", EMISSION, "        if not work.scored:\n            continue\n        b += 1", "        b += 1\n        if not work.scored:\n            continue", strings),
    ("pending: by place in the batch instead of by sequence", ENGINE, "where.get(w.sequence.key, -1) for w in works if", "i if i < len(where) else -1 for i, w in enumerate(works) if", itself),
    ("budget: one beyond the limit", ENGINE, "min(w, s.room - 1, self.parts", "min(w, s.room, self.parts", ends),
    ("release: the cache keeps its length", ENGINE, "        self.parts.kv.release(slots)", "        pass", churn),
    ("counts: proposed instead of accepted", EMISSION, "sums.add(draft.counts[b], accepted,", "sums.add(draft.counts[b], draft.counts[b],", strings),
    ("counts: drafts behind the end count as accepted", EMISSION, "*ledger, kept)", "*ledger)", strings),
    ("counts: tokens behind the end", EMISSION, "counts.emitted += kept", "counts.emitted += len(tokens)", strings),
    ("end: finished sequences stay", ENGINE, "        for sequence in out.ended:\n            self._forget(sequence)", "        pass", strings),
    ("guard: tokens outside the vocabulary pass", GUARD, "if not 0 <= token < vocab_size}", "if not 0 <= token}", guards),
    ("guard: negative tokens pass", GUARD, "if not 0 <= token < vocab_size}", "if not token < vocab_size}", guards),
    ("guard: laws of NaN pass", GUARD, "return set() if bool(fine.all()) else", "return set() if True else", guards),
    ("scheduler: a slot handed out and kept", SCHEDULER, "self._free.pop(), 0", "self._free[-1], 0", churn),
    ("scheduler: a slot lost for ever", SCHEDULER, "        self._free.append(sequence.slot)\n", "", churn),
    ("scheduler: every prompt chunk is judged", SCHEDULER, "Work(sequence, part, part == missing)", "Work(sequence, part, True)", strings),
    ("scheduler: a dropped sequence keeps its slot", SCHEDULER, "        sequence.slot, sequence.cached = -1, 0", "        pass", churn),
    ("sequence: goes on after its end", SEQUENCE, "            if self.finish_reason is not None:\n                break", "", ends),
    ("sequence: one token too many", SEQUENCE, "elif self.room <= 0:", "elif self.room < 0:", ends),
    ("rows: positions by order instead of depth", TYPES, "position.append(position[first + up] + 1)", "position.append(position[-1] + 1)", caches),
    ("rows: a node below its neighbour's nodes", TYPES, "up if up < 0 else up - low for", "up for", strings),
    ("rows: a child hangs on the anchor", TYPES, "tuple(size + up for up in parents)", "tuple(size - 1 for up in parents)", strings),
    ("rows: scored one row early", TYPES, "anchors.append(first + size - 1)", "anchors.append(first + max(size - 2, 0))", strings),
    ("take: the first sequence's tree for all", TYPES, "[self.tree(b) if b >= 0", "[self.tree(0) if b >= 0", itself),
    ("take: laws in the old order", TYPES, "row=tuple(self.q.row[k] for k in nodes)", "row=tuple(self.q.row[: len(nodes)])", itself),
    ("cache: the accepted path stays where it was drafted", KV, "if list(path) != list(range(len(path))):", "if False:", caches),
    ("cache: only the keys move", KV, "            self.v[:, s.slot, :, base : base + len(path)] = self.v[:, s.slot].index_select(2, place)\n", "", strings),
    ("cache: rejected rows stay", KV, "self.length[s.slot] = base + len(path)", "self.length[s.slot] = base + len(s.parent)", strings),
    ("cache: every path starts at the anchor's row", KV, "base + i for i in path]", "base + i - 1 for i in path]", caches),
    ("cache: length of a neighbour", KV, "            self.length[s.slot] = base + len(path)", "            self.length[0] = base + len(path)", strings),
    ("law: temperature of the first row for all", LAW, "params = [params_of(s) for s in sequences]", "params = [params_of(sequences[0]) for s in sequences]", settings),
    ("law: the minimum length ignores the path", LAW, "output_length(sequences[i]) + len(paths[i]) <", "output_length(sequences[i]) <", strings),
    ("history: the prompt counts as output", HISTORY, "if i >= prompt:", "if True:", strings),
    ("history: of the slot's last owner", HISTORY, "grown = tokens is self._tokens and prompt == self._prompt and", "grown =", strings),
    ("history: drafted tokens are not counted", HISTORY, "                counts[place] += 1.0\n        if new", "                pass\n        if new", strings),
]  # fmt: skip


def plant(monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str) -> None:
    """Put the functions of `name`, compiled with the mistake, in the place of the honest ones, wherever they were imported."""
    honest = sys.modules[name]
    source = Path(str(honest.__file__)).read_text()
    if source.count(old) != 1:
        raise AssertionError(f"{name} holds {source.count(old)} times the text {old!r}: update the mutant")
    wrong = ModuleType(name)
    wrong.__file__ = honest.__file__
    monkeypatch.setitem(sys.modules, name, wrong)  # dataclasses look their module up while they are made
    exec(compile(source.replace(old, new), str(honest.__file__), "exec"), wrong.__dict__)
    monkeypatch.setitem(sys.modules, name, honest)
    for word, thing in vars(honest).items():
        if isinstance(thing, type) and thing.__module__ == name:
            for member, value in vars(getattr(wrong, word)).items():
                if isinstance(value, FunctionType | property | staticmethod) and (
                    not member.startswith("__") or member == "__call__"
                ):
                    monkeypatch.setattr(thing, member, value)
        elif isinstance(thing, FunctionType) and thing.__module__ == name:
            for module in [m for key, m in sys.modules.items() if key.startswith("outrider")]:
                for alias in [a for a, v in vars(module).items() if v is thing]:
                    monkeypatch.setattr(module, alias, getattr(wrong, word))
    for word, thing in vars(honest).items():  # the wrong functions make honest objects
        if isinstance(thing, type) and thing.__module__ == name:
            monkeypatch.setattr(wrong, word, thing)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_honest_engine_passes(check) -> None:
    check()


def test_the_table_is_large() -> None:
    assert len(MUTANTS) >= 30
    assert len({name for name, *_ in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[0])
def test_mutant_is_killed(mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    _, module, old, new, check = mutant
    for sampling in SAMPLING:
        plain(sampling)
    plant(monkeypatch, module, old, new)
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError, RuntimeError, OutriderError)):
        check()
