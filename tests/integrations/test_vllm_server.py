"""Ledger sums, page, parts and settings of the vLLM package, without vLLM; and that vLLM is not imported without need."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.errors import ConfigError
from outrider.integrations import vllm
from outrider.integrations.vllm import worker
from outrider.integrations.vllm.endpoint import Ours, describe
from outrider.integrations.vllm.monitor import VllmMonitor
from outrider.integrations.vllm.served import Server
from outrider.integrations.vllm.settings import Settings
from outrider.integrations.vllm.status import parts_of
from outrider.integrations.vllm.sums import StepSums
from outrider.integrations.vllm.worker import Ledgered
from outrider.nn.large_pages import Gathered
from outrider.records import Counts
from tests.integrations.vllm_stubs import config


def iteration(emitted: int, first: int = 0, later: int = 0, finished: list[Any] | None = None) -> Any:
    return SimpleNamespace(
        num_generation_tokens=emitted,
        time_to_first_tokens_iter=[0.1] * first,
        inter_token_latencies_iter=[0.1] * later,
        finished_requests=finished or [],
    )


def scheduler(steps: list[tuple[int, int]] | None) -> Any:
    """vLLM's statistics of a step whose requests drafted and accepted these."""
    stats = None
    if steps is not None:
        stats = SimpleNamespace(
            num_drafts=len(steps),
            num_draft_tokens=sum(k for k, _ in steps),
            num_accepted_tokens=sum(a for _, a in steps),
            num_draft_tokens_per_pos=[sum(k > d for k, _ in steps) for d in range(4)],
            num_accepted_tokens_per_pos=[sum(a > d for _, a in steps) for d in range(4)],
        )
    return SimpleNamespace(num_running_reqs=2, num_waiting_reqs=1, kv_cache_usage=0.5, spec_decoding_stats=stats)


def test_sums_equal_a_recount_where_lengths_are_equal() -> None:
    draw, sums, want = random.Random(0), StepSums("m"), Counts()
    for _ in range(200):
        length = draw.randrange(1, 5)
        steps = [(length, draw.randrange(length + 1)) for _ in range(draw.randrange(1, 6))]
        for k, a in steps:
            want.add(k, a, min(a + 1, k), 0.0, 0.0, 0.0)
        sums.record(scheduler(steps), iteration(sum(a + 1 for _, a in steps), later=len(steps)))
    got = sums.metrics.counts
    for name in ("steps", "proposed", "judged", "accepted", "rejected", "emitted", "judged_at", "accepted_at"):
        assert getattr(got, name) == (
            want.emitted or want.accepted + want.steps if name == "emitted" else getattr(want, name)
        )
    assert sums.unsure == 0 and sums.metrics.running == 2 and sums.metrics.waiting == 1


def test_ragged_steps_are_bounded_and_the_doubt_is_counted() -> None:
    draw, sums, judged = random.Random(1), StepSums("m"), 0
    for _ in range(300):
        steps = [(k := draw.randrange(1, 5), draw.randrange(k + 1)) for _ in range(3)]
        judged += sum(min(a + 1, k) for k, a in steps)
        sums.record(scheduler(steps), iteration(1, later=3))
    assert judged <= sums.metrics.counts.judged <= judged + sums.unsure


def test_tokens_per_step_counts_the_steps_without_drafts() -> None:
    """10 steps with drafts of which half accept 2, and 37 without: vLLM's mean acceptance length says 2, the truth is 1.2."""
    sums = StepSums("m")
    for i in range(47):
        sums.record(scheduler([(2, 2 * (i % 2))] if i < 10 else None), iteration(1 + 2 * (i < 10 and i % 2), later=1))
    c = sums.metrics.counts
    assert c.emitted == 57 and c.steps == 47 and c.accepted == 10


def test_finished_requests_enter_the_histograms() -> None:
    done = SimpleNamespace(
        finish_reason="length", num_generation_tokens=11, e2e_latency=3.0, decode_time=2.0, num_prompt_tokens=7
    )
    sums = StepSums("m")
    sums.record(scheduler(None), iteration(1, later=1, finished=[done]))
    assert sums.metrics.outcomes["length"] == 1 and sums.metrics.prompt_tokens == 7
    assert sums.metrics.first_token.total == 1.0 and sums.metrics.per_token.total == pytest.approx(0.2)


def report(**tap: Any) -> dict[str, Any]:
    names = ("steps", "proposed", "judged", "accepted", "rejected", "risk", "spread", "bias")
    both = dict.fromkeys(names, 0.0) | tap
    return {
        "tap": {"all": both, "engine_seeded": both, "judged_at": [5, 2, 0, 0], "accepted_at": [3, 1, 0, 0]},
        "unwatched": "",
        "restless": "",
        "drafting": "",
        "note": {"outlook": [2, 3, 1.4, 0.01, 0.3], "speeds": [[0, 1.0, 1.0, 1.0], [3, 2.0, 1.4, 1.43]]},
        "proposer": None,
        "repair": "repaired",
        "large_pages": {"bytes": 5 << 20, "of": 7 << 20},
    }


class Client:
    """vLLM's engine client."""

    errored = False

    def __init__(self, answer: Any) -> None:
        self.vllm_config, self.answer = config(), answer

    async def collective_rpc(self, method: str, timeout: float | None = None) -> list[Any]:
        assert method == "outrider_report"
        return [self.answer]


def test_the_page_the_metrics_and_the_alerts_get_the_workers_sums() -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    client = Client(report(proposed=20.0, judged=7.0, accepted=4.0, rejected=3.0, risk=2.5, spread=1.5))
    server = Server(client, StepSums("m"), True)
    server.sums.record(scheduler([(4, 4)]), iteration(9, later=4))
    describe(server)
    watch = VllmMonitor(server, 2.0)
    asyncio.run(server.ask())
    watch.tick()
    shown = json.loads(json.dumps(watch.state(0.0)))
    assert shown["ledger"]["predicted"] == 2.5 and shown["ledger"]["observed"] == 3 and shown["ledger"]["agrees"]
    assert shown["positions"] == {"judged": [5, 2], "accepted": [3, 1]} and shown["now"]["emitted"] == 9
    assert shown["outlook"]["length"] == 3 and shown["speeds"][1]["speedup"] == 1.43
    assert shown["server"]["missing"] == ["play", "requests", "phases"]
    assert shown["server"]["drafter"] == "eagle3" and shown["alerts"] and shown["history"]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Ours(server.metrics))
    text = generate_latest(registry).decode()
    assert 'outrider_spec_decode_predicted_rejections_total{model_name="m"} 2.5' in text
    assert 'outrider_spec_decode_length{model_name="m"} 3.0' in text and "vllm:" not in text


def test_evidence_against_a_worker_that_rejects_more_than_it_predicts() -> None:
    server = Server(Client(None), StepSums("m"), True)
    for turn in range(1, 40):
        server.take(report(judged=100.0 * turn, rejected=60.0 * turn, risk=30.0 * turn, spread=21.0 * turn))
    assert server.metrics.residuals.doubted
    fine = Server(Client(None), StepSums("m"), True)
    for turn in range(1, 40):
        fine.take(report(judged=100.0 * turn, rejected=30.0 * turn, risk=30.0 * turn, spread=21.0 * turn))
    assert not fine.metrics.residuals.doubted


def test_parts_say_which_setting_switched_what_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "outrider,outrider_ledger,outrider_http")
    assert all(row["live"] for row in parts_of(config(), report(), True))
    found = {row["part"]: row["found"] for row in parts_of(config(), report(), True)}
    assert found["large pages"] == "5 of 7 MB of weights, keys and values moved there"
    monkeypatch.setenv("VLLM_PLUGINS", "outrider_http")
    off = {row["part"]: row["remedy"] for row in parts_of(config(), None, False) if not row["live"]}
    assert "VLLM_PLUGINS=outrider,outrider_ledger,outrider_http" in off["ledger"] and "ledger" in off
    assert "--worker-cls" in off["predicted rejections"] and off["repair"]
    own = config()
    own.scheduler_config.scheduler_cls, own.speculative_config.method = None, "eagle3"
    rows = {row["part"]: row for row in parts_of(own, report(), True)}
    assert not rows["lengths"]["live"] and "--scheduler-cls" in rows["lengths"]["remedy"]
    own.speculative_config = None
    assert "speculative-config" in parts_of(own, None, True)[-1]["remedy"]


@pytest.mark.parametrize(
    ("restless", "drafting", "said"),
    [
        ("", "", "the drafter rests at length 0"),
        (
            "",
            "with asynchronous scheduling",
            "rests at length 0, but its steps prepare drafts: with asynchronous scheduling",
        ),
        (
            "on GPUs drafters read every token",
            "on GPUs drafters read every token",
            "; on GPUs drafters read every token",
        ),
    ],
)
def test_parts_say_what_length_0_still_costs(restless: str, drafting: str, said: str) -> None:
    """A drafter that does not rest is the reason for both, and is named once."""
    rows = {
        row["part"]: row for row in parts_of(config(), report() | {"restless": restless, "drafting": drafting}, True)
    }
    assert rows["lengths"]["found"].endswith(said)


def test_a_rule_that_is_not_in_place_is_no_rule() -> None:
    """Without our worker class doctor says so; where our worker cannot put it there, the server does not start."""
    for found, live in ((None, False), (report(), True)):
        rows = {row["part"]: row for row in parts_of(config(rule="block"), found, True)}
        assert rows["rule"]["live"] == live and bool(rows["rule"]["remedy"]) != live

    class Newer:
        use_v2_model_runner, model_runner = True, SimpleNamespace()

        def __init__(self, own: Any) -> None:
            self.vllm_config = own

        def load_model(self) -> str:
            return "loaded"

    class Worker(Ledgered, Newer):
        """Ours before a worker whose runner has another hook."""

    assert Worker(config()).load_model() == "loaded"
    with pytest.raises(ConfigError, match="'block' cannot take the place"):
        Worker(config(rule="block")).load_model()


@pytest.mark.parametrize(("device", "moved"), [("cpu", (5, 7)), ("cuda:0", (0, 0))])
def test_a_worker_moves_what_it_has_loaded_into_large_pages_on_cpus_alone(
    device: str, moved: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights first, keys and values when they are there; it tells the sums."""
    calls = iter([Gathered(3, 4), Gathered(2, 3)])
    monkeypatch.setattr(worker, "gather", lambda: next(calls))

    class Theirs:
        vllm_config = SimpleNamespace(speculative_config=None)
        model_runner = SimpleNamespace(device=device)

        def load_model(self) -> None: ...

        def compile_or_warm_up_model(self) -> str:
            return "warm"

    class Worker(Ledgered, Theirs):
        """Ours before theirs."""

    one, other = Worker(), Worker()
    one.load_model()
    assert one.compile_or_warm_up_model() == "warm"
    assert one.gathered == moved
    assert other.gathered == (0, 0)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"drafts": "ngram"}, "did you mean 'draft'"),
        ({"lengths": "adaptiv"}, "did you mean 'adaptive'"),
        ({"lengths": [1, -1]}, "whole numbers"),
        ({"rule": "tv_budget"}, "allow_lossy"),
        ({"rule": "tv_buget"}, "tv_budget"),
        ({"margin": 2}, "0 to 1"),
        ({"first": True}, "whole number"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(own: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings.of({"outrider": own})


def test_settings_of_others_are_left_alone() -> None:
    assert Settings.of({"else": 1}) == Settings.of({}) == Settings.of(None) == Settings()


def test_entry_points_name_what_is_there() -> None:
    groups = {"vllm.general_plugins", "vllm.stat_logger_plugins", "vllm.endpoint_plugins"}
    found = {e.name: e for group in groups for e in entry_points(group=group) if e.value.startswith("outrider.")}
    if not found:
        pytest.skip("this outrider was not installed as a package with entry points")
    assert sorted(found) == sorted(vllm.PLUGINS)
    assert found["outrider"].load() is vllm.register
    assert found["outrider_http"].load().name == "outrider_http"


def test_nothing_of_vllm_is_imported_and_its_absence_is_said() -> None:
    code = (
        "import sys, outrider.integrations.vllm as v\n"
        "from outrider.integrations.vllm import proposer, scheduler, worker, tap, sums, repair, v2, status, ledger\n"
        "assert 'vllm' not in sys.modules\n"
        "sys.modules['vllm'] = None\n"
        "try: v.Scheduler\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("ConfigError") and "outrider[vllm]" in said
