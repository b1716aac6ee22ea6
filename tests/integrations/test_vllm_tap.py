"""The ledger's tap and our rules in the place of vLLM's `rejection_sample`, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import chi2

from outrider.integrations.vllm.repair import expand, is_faulty
from outrider.integrations.vllm.settings import Settings
from outrider.integrations.vllm.tap import Ruled, Tap, Watched, risks
from outrider.integrations.vllm.worker import TAKES, stand_in
from outrider.verify.registry import load_rule

V, K = 6, 4


def metadata(temperature: list[float], seeded: list[int] = []) -> Any:  # noqa: B006 (never changed)
    heat = torch.tensor(temperature)
    generators = {b: torch.Generator().manual_seed(b) for b in seeded}
    return SimpleNamespace(
        temperature=heat, all_greedy=bool((heat == 0).all()), all_random=bool((heat > 0).all()), generators=generators
    )


def theirs(
    draft_token_ids: Any,
    num_draft_tokens: Any,
    max_spec_len: int,
    cu_num_draft_tokens: Any,
    draft_probs: Any,
    target_logits: Any,
    bonus_token_ids: Any,
    sampling_metadata: Any,
    synthetic_mode: bool = False,
) -> torch.Tensor:
    """vLLM's function, plainly: tokens one by one (Leviathan et al. 2023), point masses where there is no q."""
    out = torch.full((len(num_draft_tokens), max_spec_len + 1), -1, dtype=torch.int32)
    at = 0
    for b, count in enumerate(num_draft_tokens):
        row, greedy = [], sampling_metadata.temperature[b] == 0
        for d in range(count):
            x = int(draft_token_ids[at + d])
            p = target_logits[at + d].softmax(-1)
            if greedy:
                p = torch.nn.functional.one_hot(p.argmax(), p.numel()).float()
            q = (
                torch.nn.functional.one_hot(torch.tensor(x), p.numel()).float()
                if draft_probs is None
                else draft_probs[at + d]
            )
            if torch.rand(()) < p[x] / q[x]:
                row.append(x)
                continue
            row.append(int(torch.multinomial((p - q).clamp(min=0) + 1e-30, 1)))
            break
        else:
            row.append(int(bonus_token_ids[b, 0]))
        out[b, : len(row)] = torch.tensor(row, dtype=torch.int32)
        at += count
    return out


def call(
    judge: Any, drafted: list[int], logits: torch.Tensor, tokens: list[int], q: Any, sampling: Any
) -> torch.Tensor:
    ends = torch.tensor(drafted).cumsum(0).int()
    bonus = torch.full((len(drafted), 1), 3, dtype=torch.int32)
    return judge(torch.tensor(tokens, dtype=torch.int32), drafted, max(drafted), ends, q, logits, bonus, sampling)


def test_the_taps_sums_equal_a_recount_on_ragged_drafts() -> None:
    """Greedy and sampled requests together, some with seeds of their own, with and without q, and requests without a draft."""
    torch.manual_seed(0)
    tap = Tap(K)
    watched = Watched(theirs, tap)
    want = dict.fromkeys(("steps", "proposed", "judged", "accepted", "rejected", "risk", "spread"), 0.0)
    own = dict(want)
    judged_at, accepted_at = [0] * K, [0] * K
    for turn in range(60):
        drafted = torch.randint(0, K + 1, (5,)).tolist()
        drafted[0] = max(drafted[0], 1)
        n = sum(drafted)
        logits, q = torch.randn(n, V), None if turn % 2 else torch.rand(n, V).softmax(-1)
        tokens = torch.randint(0, V, (n,)).tolist() if q is None else torch.multinomial(q, 1)[:, 0].tolist()
        heat = [0.0, 1.0, 1.0, 0.0, 1.0] if q is None else [1.0] * 5
        out = call(watched, drafted, logits.clone(), tokens, q, metadata(heat, [1]))
        at = 0
        for b, count in enumerate(drafted):
            a = int((out[b] != -1).sum()) - 1
            sums = [want] if b == 1 else [want, own]
            for d in range(count):
                p = logits[at + d].softmax(-1)
                if heat[b] == 0:
                    risk = float(int(p.argmax()) != tokens[at + d])
                elif q is None:
                    risk = 1 - float(p[tokens[at + d]])
                else:
                    risk = 1 - float(torch.minimum(p, q[at + d]).sum())
                for s in sums:
                    s["proposed"] += 1
                    s["steps"] += d == 0
                    if d <= a:
                        s["judged"] += 1
                        s["accepted"] += d < a
                        s["rejected"] += d == a
                        s["risk"] += risk
                        s["spread"] += risk * (1 - risk)
                judged_at[d] += d <= a
                accepted_at[d] += d < a
            at += count
    found = tap.report()
    for name, sums in (("all", want), ("engine_seeded", own)):
        assert {k: found[name][k] for k in sums} == pytest.approx(sums, abs=1e-4)
    assert found["judged_at"] == judged_at and found["accepted_at"] == accepted_at
    assert found["all"]["judged"] == found["all"]["accepted"] + found["all"]["rejected"]
    tap.reset()
    assert tap.report()["all"]["judged"] == 0.0


def test_a_step_without_drafts_gives_what_vllm_gives_and_counts_nothing() -> None:
    tap, drafted = Tap(K), [0, 0, 0]
    given = (torch.zeros(0, V), list[int](), None, metadata([0.0, 1.0, 1.0], []))
    found, wanted = (call(judge, drafted, *given) for judge in (Watched(theirs, tap), theirs))
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    assert tap.report()["all"]["steps"] == 0.0


def test_placeholders_count_as_no_drafts() -> None:
    tap = Tap(K)
    out = torch.tensor([[1, 2, -1, -1], [3, -1, -1, -1]])
    tap.add([3, 2], torch.tensor([1, -1, -1, -1, -1]), torch.full((5,), 0.5), (out != -1).sum(1) - 1, ())
    found = tap.report()["all"]
    assert (found["proposed"], found["judged"], found["accepted"], found["steps"]) == (1, 1, 1, 1)


def test_risk_is_the_probability_of_rejection() -> None:
    """Against the definition; a negative control with the logits halved."""
    torch.manual_seed(1)
    logits, q = torch.randn(400, V), torch.randn(400, V).softmax(-1)
    token = torch.multinomial(q, 1)[:, 0]
    assert torch.allclose(
        risks(logits, token, q, False), 1 - torch.minimum(logits.softmax(-1), q).sum(-1).double(), atol=1e-6
    )
    best = logits.argmax(-1)
    assert risks(logits, best, None, True).sum() == 0 and risks(logits, (best + 1) % V, None, True).sum() == 400
    assert not torch.allclose(risks(logits / 2, token, None, False), risks(logits, token, None, False), atol=1e-2)


def rejected_by_chance(judge: Any, draws: int = 2000, temperature: float = 1.0) -> tuple[float, float]:
    """Chi-square of the first emitted token of `draws` requests against p, and its level at one in a billion."""
    torch.manual_seed(3)
    p = torch.tensor([0.35, 0.05, 0.2, 0.1, 0.25, 0.05])
    q = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.1, 0.1])
    logits = p.log().repeat(2 * draws, 1)
    tokens = torch.multinomial(q, 2 * draws, replacement=True).tolist()
    out = call(judge, [2] * draws, logits, tokens, q.repeat(2 * draws, 1), metadata([temperature] * draws))
    seen = torch.bincount(out[:, 0].long(), minlength=V)
    return float(((seen - draws * p) ** 2 / (draws * p)).sum()), float(chi2.isf(1e-9, V - 1))


@pytest.mark.parametrize("name", ["speculative_sampling", "block"])
def test_our_exact_rules_keep_the_distribution_in_vllms_place(name: str) -> None:
    """False alarm one in a billion."""
    tap = Tap(K)
    found, level = rejected_by_chance(Ruled(load_rule(name), tap, lambda: ["a"] * 2000))
    assert found < level
    assert tap.report()["all"]["bias"] == 0.0


def test_control_a_lossy_rule_with_a_large_budget_is_seen() -> None:
    wrong, level = rejected_by_chance(Ruled(load_rule("tv_budget:per_token=0.5"), Tap(K), lambda: ["a"] * 2000))
    assert wrong > level


def test_the_lossy_rule_spends_within_its_budgets_and_says_so() -> None:
    names = [f"r{i}" for i in range(50)]
    tap = Tap(K)
    judge = Ruled(load_rule("tv_budget:per_token=0.05,per_sequence=0.12"), tap, lambda: names)
    torch.manual_seed(0)
    for _ in range(6):
        logits, q = torch.randn(100, V), torch.rand(100, V).softmax(-1)
        tokens = torch.multinomial(q, 1)[:, 0].tolist()
        call(judge, [2] * 50, logits, tokens, q, metadata([1.0] * 50))
    found = tap.report()["all"]
    assert 0 < found["bias"] <= 0.05 * found["judged"] + 1e-9 and found["bias"] <= 0.12 * 50 + 1e-6
    assert found["bias"] > 0.1 * 50, "the budgets were used"
    greedy = Tap(K)
    judge = Ruled(load_rule("tv_budget"), greedy, lambda: names)
    logits = torch.randn(100, V)
    out = call(judge, [2] * 50, logits, logits.argmax(-1).tolist(), None, metadata([0.0] * 50))
    assert (out[:, 2] == 3).all() and greedy.report()["all"]["bias"] == 0.0


def test_we_take_vllms_place_only_where_its_interface_is_known() -> None:
    module, tap, names = SimpleNamespace(rejection_sample=theirs), Tap(K), list
    assert stand_in(module, tap, Settings(), "standard", names) == "" and isinstance(module.rejection_sample, Watched)
    assert stand_in(module, tap, Settings(), "standard", names) == "" and module.rejection_sample.inner is theirs, (
        "not twice"
    )
    assert "synthetic" in stand_in(module, tap, Settings(), "synthetic", names)
    assert "interface" in stand_in(SimpleNamespace(rejection_sample=lambda a, b: a), tap, Settings(), "standard", names)
    own = Settings(rule="tv_budget", allow_lossy=True)
    assert stand_in(module, tap, own, "standard", names) == "" and isinstance(module.rejection_sample, Ruled)
    assert len(TAKES) == 8


def test_the_probe_finds_the_fault_and_accepts_the_repair() -> None:
    def dropped(output: Any, values: Any, ends: Any, old: float, new: float, most: Any = None) -> None:
        expand(output.long(), values.long(), ends, old, new)

    assert is_faulty(dropped) and not is_faulty(expand)
    out = torch.empty(4)
    expand(out, torch.tensor([0.0, 0.5]), torch.tensor([1, 4], dtype=torch.int32), 0, 1)
    assert out.tolist() == [1.0, 0.5, 0.5, 0.5]
    whole = torch.empty(3, dtype=torch.int32)
    expand(whole, torch.tensor([7, 50], dtype=torch.int32), torch.tensor([2, 3]), 0, 0)
    assert whole.tolist() == [7, 7, 50]

    def unusable(*args: Any) -> None:
        raise RuntimeError("no kernels here")

    assert not is_faulty(unusable)
