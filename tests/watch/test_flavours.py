"""Pages of each engine become the same sums; figures are those that the engine's own counting implies, and no more."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.integrations.watch.figures import document
from outrider.integrations.watch.flavours import FLAVOURS, WANTED, flavour_of
from outrider.integrations.watch.page import parse
from outrider.integrations.watch.readers import Seen
from outrider.integrations.watch.sums import Span
from outrider.records import Counts
from outrider.telemetry.prometheus import Metrics
from tests.watch.server import PAGES


def seen(text: str) -> Seen:
    page = parse(text.encode(), WANTED)
    flavour = flavour_of(page)
    assert flavour is not None
    return flavour.read(page)


def span(text: str) -> Span:
    return Span(seen(text).sums)


@pytest.mark.parametrize(("page", "name"), [("vllm", "vLLM"), ("sglang", "SGLang"), ("llamacpp", "llama.cpp")])
def test_engines_are_told_apart_by_what_they_answer(page: str, name: str) -> None:
    found = seen(PAGES[page])
    assert found.flavour == name
    assert found.model == (None if page == "llamacpp" else "pycode")


def test_vllm_passes_are_counted_and_not_only_those_with_drafts() -> None:
    """Three requests of 50 tokens, each of one prompt pass and fifteen verifications, as the client was told."""
    s = span(PAGES["vllm"])
    assert s.get("emitted") == 150 and s.get("passes") == 48 and s.get("drafts") == 45
    assert s.tokens_per_pass == 150 / 48
    assert s.tokens_per_drafted_pass == 1 + 108 / 45  # what vLLM calls the mean acceptance length
    assert s.even and s.judged_at() == [45, 42, 33] and s.at("accepted_at") == [42, 33, 33]
    assert s.rejections() == (12, 12) and s.rejection() == (0.1, 0.1)
    lengths = document(s)["drafted"]["by_length"]
    assert lengths[0] == 1 + 42 / 45 and lengths[2] == pytest.approx(
        s.tokens_per_drafted_pass
    )  # the served length is what it was
    counts = s.counts()
    assert (counts.judged, counts.rejected, counts.steps, counts.emitted) == (120, 12, 48, 150)
    assert s.under("ended")["length"] == 3 and s.quantiles("first")["median"] is not None


def test_vllm_without_times_counts_passes_by_tokens() -> None:
    kept = "".join(line for line in PAGES["vllm"].splitlines(keepends=True) if "inter_token" not in line)
    s = seen(kept)
    assert s.sums["passes"] == 150 - 108 and "too small" in s.how


def test_an_ngram_server_is_worth_less_than_its_mean_acceptance_length() -> None:
    """The case that vLLM's own figure hides: 60 tokens in 47 passes, ten of which had drafts, 13 accepted."""
    labels = '{engine="0",model_name="m"}'
    rows = {
        "generation_tokens_total": 60,
        "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 46,
        "spec_decode_num_drafts_total": 10,
        "spec_decode_num_draft_tokens_total": 33,
        "spec_decode_num_accepted_tokens_total": 13,
    }
    text = "".join(f"vllm:{name}{labels} {value}\n" for name, value in rows.items())
    at = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    text += "".join(f'{at}{{engine="0",model_name="m",position="{i}"}} {n}\n' for i, n in enumerate((7, 4, 2, 0)))
    s = span(text)
    assert s.tokens_per_pass == pytest.approx(1.277, abs=1e-3) and s.tokens_per_drafted_pass == 2.3
    assert not s.even and s.judged_at() == [] and s.rejections() == (5, 10)
    assert s.counts().judged == s.counts().rejected == 0  # what is not certain adds nothing to a ledger


def test_sglang_counts_verifications_and_prompts() -> None:
    found = seen(PAGES["sglang"])
    s = Span(found.sums)
    assert s.get("passes") == 1020 and s.tokens_per_pass == 2570 / 1020
    assert s.get("drafts") == 1000 and s.get("accepted") == 1550 and s.rejections() is None
    assert found.gauges["running"] == 3 and found.gauges["waiting"] == 2  # the total, not the priorities besides
    assert found.gauges["reported"] == 2.71 and found.gauges["length"] == 3
    plain = "".join(line for line in PAGES["sglang"].splitlines(keepends=True) if "spec_" not in line)
    assert span(plain).tokens_per_pass == 1.0


def test_llamacpp_counts_tokens_that_were_not_drafted() -> None:
    s = span(PAGES["llamacpp"])
    assert s.get("passes") == 14 and s.tokens_per_pass == 20 / 14 and s.get("drafts") == 12
    low, high = s.rejections() or (None, None)
    assert (low, high) == (10, 12)  # 44 tokens in 12 drafts of up to 4: at least 38 / 4, at most every draft


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=40))
def test_bounds_of_rejections_hold_what_happened(steps: list[tuple[int, int]]) -> None:
    """Whatever drafts and acceptances a page sums up, the interval holds the number of rejections; with equal drafts it is a
    point."""
    drafts = [(k, min(a, k)) for k, a in steps]
    longest = max(k for k, _ in drafts)
    sums = {"drafts": float(len(drafts)), "proposed": float(sum(k for k, _ in drafts))}
    sums["accepted"] = float(sum(a for _, a in drafts))
    sums |= {f"accepted_at/{d}": float(sum(a > d for _, a in drafts)) for d in range(longest)}
    s, true = Span(sums), sum(a < k for k, a in drafts)
    low, high = s.rejections() or (-1.0, -1.0)
    assert low <= true <= high
    if len({k for k, _ in drafts}) == 1:
        assert low == high == true
        assert s.judged_at() == [sum(min(a + 1, k) > d for k, a in drafts) for d in range(longest)]
        assert sum(s.judged_at()) == s.counts().judged


def test_outriders_plugin_in_vllm_is_read_beside_vllm() -> None:
    """It exports all names that our server has: the passes stay vLLM's, the ledger is ours once it has verdicts."""
    metrics = Metrics("pycode")
    metrics.gauges["engine_alive"] = ("", lambda: 1.0)
    both = PAGES["vllm"] + 'vllm:engine_sleep_state{engine="0",sleep_state="awake"} 1.0\n'

    def ours() -> str:
        """Its families without those that it does not export there: vLLM has them itself."""
        lines = metrics.text().decode().splitlines(keepends=True)
        return "".join(line for line in lines if "vllm:" not in line and "process_" not in line)

    silent = seen(both + ours())
    assert silent.flavour == "vLLM with Outrider's plug-in" and Span(silent.sums).rejections() == (12, 12)
    assert "risk" not in silent.sums
    places = {"judged_at": [20, 15, 10], "accepted_at": [14, 12, 8]}
    metrics.counts = Counts(steps=20, proposed=60, judged=45, accepted=34, rejected=11, emitted=54, risk=11.5, **places)
    found = seen(both + ours())
    s = Span(found.sums)
    assert found.flavour == silent.flavour and s.get("passes") == 48 and s.get("emitted") == 150
    assert s.rejections() == (11, 11) and s.get("risk") == 11.5 and s.get("judged") == 45
    assert seen(metrics.text().decode()).flavour == "Outrider"


def test_several_engines_of_one_server_are_summed() -> None:
    twice = PAGES["vllm"] + "".join(
        line.replace('engine="0"', 'engine="1"')
        for line in PAGES["vllm"].splitlines(keepends=True)
        if 'engine="0"' in line
    )
    one, two = span(PAGES["vllm"]), span(twice)
    names = ("emitted", "passes", "drafts", "accepted", "accepted_at/0")
    assert all(two.get(name) == 2 * (one.get(name) or 0) for name in names)


def test_the_table_of_flavours_is_whole() -> None:
    for flavour in FLAVOURS:
        assert set(flavour.names) <= WANTED and set(flavour.marks) <= WANTED and flavour.cannot
