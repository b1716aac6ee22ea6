"""An experiment on the requests of a server, through its ASGI application: placed, kept, stopped when it harms, gone on with."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from outrider.build import Engine
from outrider.cli import live_experiment as command
from outrider.cli.experiment_print import show_live
from outrider.control.fixed import Fixed
from outrider.drafters.combine import first_of, gated
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.ngram import NGram
from outrider.errors import CapacityError, ConfigError
from outrider.evaluate.experiments import live as module
from outrider.evaluate.experiments.assignment import arm_of, arm_overrides, unit_of
from outrider.evaluate.experiments.experiment import Experiment
from outrider.evaluate.experiments.live import KIND, LiveExperiment, read
from outrider.evaluate.experiments.tally import STOPPED
from outrider.evaluate.store.store import Store
from outrider.options import EngineOptions
from outrider.params import SamplingParams
from outrider.serve.app import create_app
from outrider.serve.settings import Settings
from outrider.verify import load_rule
from tests.evaluate.liars import DRAFT, TARGET

LENGTH = 4
BODY = {
    "model": "toy",
    "prompt": [3, 1, 4],
    "max_tokens": 20,
    "ignore_eos": True,
    "return_token_ids": True,
    "stream": True,
}
E = Experiment("live", {"off": {"draft": "none"}, "four": {}}, "off")


class Sleepy(ModelDrafter):
    """Drafts so slowly that it does harm."""

    pause = 0.0

    def draft(self, evidence, budget):
        if any(budget):
            time.sleep(self.pause)
        return super().draft(evidence, budget)


def engine(pause: float = 0.0, slots: int = 8, *, selectable: bool = False, **wiring: Any) -> Engine:
    drafter = Sleepy(DRAFT, LENGTH)
    drafter.pause = pause
    part = gated(drafter) if selectable else drafter
    return Engine(TARGET, part, load_rule("speculative_sampling"), Fixed(LENGTH), slots=slots, max_length=400, **wiring)


def trial(path: Path, e: Experiment = E) -> LiveExperiment:
    return LiveExperiment(e, arm_overrides(e, EngineOptions(length=LENGTH)), path)


def served(path: Path, work: Callable[[Any], Any], e: Experiment = E, *, grace: float = 5.0, **made: Any) -> Any:
    """The result of `work(app)` while the application runs with the experiment; everything is closed afterwards."""
    one = trial(path, e)
    app = create_app(partial(engine, **made), Settings("toy", grace=grace), adaptive=False, trial=one)

    async def run() -> Any:
        async with app.router.lifespan_context(app):
            return await work(app)

    result = asyncio.run(run())
    assert "outrider-trial" not in {t.name for t in threading.enumerate()}
    return result


async def ask(app: Any, user: str | None = None, headers: dict[str, str] | None = None, **body: Any) -> str | None:
    """The arm of a request that was answered."""
    whole = BODY | ({"user": user} if user else {}) | body
    status, found, data = await command.post(app, "/v1/completions", whole, headers)
    assert status == 200 and data.endswith(b"data: [DONE]\n\n"), data
    return found.get("x-outrider-arm")


def kept(path: Path, name: str = "live") -> dict[Any, dict[str, Any]]:
    with Store(path, read_only=True) as db:
        return db.records(db.experiment(name)[0])


def test_every_request_has_its_users_arm_and_one_record(tmp_path: Path) -> None:
    path, users = tmp_path / "a.db", [f"u{i}" for i in range(12)]

    async def work(app: Any) -> list[str | None]:
        got = await asyncio.gather(*(ask(app, u) for u in users * 2))
        assert await ask(app, headers={"x-outrider-user": "u3"}) == arm_of(E, "u3")
        assert await ask(app, "u3", speculation={"length": 1}) is None  # it says itself how it is drafted for
        assert await ask(app, "u3", seed=1) is None  # its text was promised
        assert await ask(app, "u3", seed=1, temperature=0) == arm_of(E, "u3")
        assert (await command.post(app, "/v1/completions", BODY | {"prompt": [99]}))[0] == 400
        return got

    assert served(path, work) == [arm_of(E, u) for u in users * 2]
    found = kept(path)
    assert sorted(number for _, number, _ in found) == list(range(27))
    assert [r["outcome"] for r in found.values()].count("refused") == 1
    assert {(arm, r["unit"]) for (arm, _, _), r in found.items() if r["outcome"] == "length"} == {
        (arm_of(E, u), unit_of(E, u)) for u in users
    }
    for (arm, _, _), r in found.items():
        if r["outcome"] == "length":
            c = r["counts"]
            assert r["tokens"] == 20 and r["later"] == 19 and r["seconds"] > 0 and r["first"] > 0
            assert c["emitted"] == 20 and (c["proposed"] > 0) == (arm == "four") and (c["risk"] > 0) == (arm == "four")
    assert not any(u in json.dumps(list(found.values())) for u in ('"u1"', "user"))
    assert show_live(command.document("live", str(path)), json=True) in (0, 3)


def test_a_harmful_arm_is_stopped_early_and_its_users_get_the_base(tmp_path: Path) -> None:
    """The drafter takes many times as long as a step: far fewer users than planned are needed to see it."""
    path, most = tmp_path / "a.db", 80

    async def work(app: Any) -> list[tuple[str, str | None]]:
        got: list[tuple[str, str | None]] = []
        while len(got) < most and not (got and str(got[-1][1]).endswith(STOPPED)):
            user = f"u{len(got)}"
            got.append((user, await ask(app, user)))
        return got

    got = served(path, work, pause=0.03, slots=1)
    assert len(got) < most
    user, last = got[-1]
    assert arm_of(E, user) == "four" and last == "four" + STOPPED
    found = kept(path)
    assert len(found) == len(got)
    assert found["four" + STOPPED, len(got) - 1, 0]["counts"]["proposed"] == 0
    _, tally, status = read("live", path)
    assert status.stopped == ("four",) and status.comparisons[0].decision == "worse"
    assert sum(s.requests for s in tally.arms.values()) == len(got) - 1
    assert show_live(command.document("live", str(path)), json=False) == 0

    # the server is started again: it knows, and goes on in the same run
    assert served(path, lambda app: ask(app, user)) == "four" + STOPPED
    assert {session for _, _, session in kept(path)} == {0, 1}


def test_within_a_stretch_of_time_everybody_has_one_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of the test's own: three requests a stretch, ten stretches."""
    path, e, now = tmp_path / "a.db", replace(E, window=3.0), itertools.count(3000.0)
    monkeypatch.setattr(module, "time", lambda: next(now))
    got = served(path, lambda app: asyncio.gather(*(ask(app, f"u{i}") for i in range(30))), e)
    found = kept(path)
    assert {(arm, r["unit"]) for (arm, _, _), r in found.items()} == {
        (arm_of(e, f"window {k}"), unit_of(e, f"window {k}")) for k in range(1000, 1010)
    }
    assert sorted(got) == sorted(arm for arm, _, _ in found) and {*got} == {"off", "four"}
    _, tally, _ = read("live", path)
    assert sum(len(side.values) for side in tally.arms.values()) == 9  # the last is not over


class Heard(ModelDrafter):
    """Notes for how many sequences it was asked to draft."""

    asked = 0

    def draft(self, evidence, budget):
        self.asked += sum(b > 0 for b in budget)
        return super().draft(evidence, budget)


@pytest.mark.parametrize("choice", [(0,), (1,), (0, 1), None])
def test_requests_draft_with_the_drafters_they_chose(choice: tuple[int, ...] | None) -> None:
    """Two parts, of which the second speaks only where the first may not; with the first alone the text is that of it alone."""
    parts = [Heard(DRAFT, LENGTH), Heard(TARGET.perturbed(0.3, 2), LENGTH)]
    one = Engine(
        TARGET, gated(first_of(*parts)), load_rule("speculative_sampling"), Fixed(LENGTH), slots=4, max_length=64
    )
    params = SamplingParams(max_tokens=20, seed=1)
    got = one.generate([[3, 1], [5, 7]], replace(params, drafters=choice) if choice else params)
    first = choice is None or 0 in choice
    assert (parts[0].asked > 0, parts[1].asked > 0) == (first, not first)
    alone = Heard(DRAFT if first else TARGET.perturbed(0.3, 2), LENGTH)
    plain = Engine(TARGET, alone, load_rule("speculative_sampling"), Fixed(LENGTH), slots=4, max_length=64)
    assert [r.outputs[0].token_ids for r in got] == [
        r.outputs[0].token_ids for r in plain.generate([[3, 1], [5, 7]], params)
    ]


def test_an_arm_may_leave_loaded_drafters_out(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    e = Experiment("parts", {"all": {}, "gram": {"draft": "ngram"}}, "all")
    parts = (NGram(LENGTH), Heard(DRAFT, LENGTH))
    one = LiveExperiment(e, arm_overrides(e, EngineOptions(draft="ngram+toy", length=LENGTH)), path)

    def made(*, selectable: bool, **wiring: Any) -> Engine:
        drafter = gated(first_of(*parts)) if selectable else first_of(*parts)
        return Engine(
            TARGET, drafter, load_rule("speculative_sampling"), Fixed(LENGTH), slots=8, max_length=64, **wiring
        )

    app = create_app(made, Settings("toy"), adaptive=False, trial=one)
    users = {arm: next(f"u{i}" for i in range(99) if arm_of(e, f"u{i}") == arm) for arm in e.arms}

    async def work() -> tuple[int, int]:
        async with app.router.lifespan_context(app):
            parts[1].asked = 0
            assert await ask(app, users["gram"]) == "gram"
            silent = parts[1].asked
            assert await ask(app, users["all"]) == "all"
            return silent, parts[1].asked

    silent, asked = asyncio.run(work())
    assert silent == 0 < asked
    assert {arm for arm, _, _ in kept(path, "parts")} == {"all", "gram"}


def test_no_record_is_lost_when_the_server_ends_under_load(tmp_path: Path) -> None:
    path, count = tmp_path / "a.db", 30

    async def work(app: Any) -> list[asyncio.Task[Any]]:
        long = [
            asyncio.create_task(command.post(app, "/v1/completions", BODY | {"max_tokens": 390})) for _ in range(count)
        ]
        while not any(t.first for t in app.state.bridge.tickets.values()):
            await asyncio.sleep(0.01)
        assert len(app.state.bridge.tickets) == count
        return long

    served(path, work, grace=0.05, slots=4)
    found = kept(path)
    assert sorted(number for _, number, _ in found) == list(range(count))
    assert {r["outcome"] for r in found.values()} <= {"error", "length", "abort"}


def test_clients_that_leave_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.db"

    async def work(app: Any) -> None:
        said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        said.put_nowait({"type": "http.request", "body": json.dumps(BODY | {"max_tokens": 390}).encode()})
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
        scope |= {"raw_path": b"", "root_path": "", "scheme": "http", "http_version": "1.1"}

        async def send(message: dict[str, Any]) -> None:
            if message.get("body"):
                said.put_nowait({"type": "http.disconnect"})

        await app(scope, said.get, send)

    served(path, work)
    (found,) = kept(path).values()
    assert found["outcome"] == "abort" and 0 < found["tokens"] < 390


def test_records_wait_for_a_store_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, refused = tmp_path / "a.db", iter([True, True, False, True])
    inner = Store.append

    def append(self: Store, *given: Any) -> bool:
        if next(refused, False):
            raise CapacityError("the disk is full")
        return inner(self, *given)

    monkeypatch.setattr(Store, "append", append)
    monkeypatch.setattr(module, "WRITE_RETRY_SECONDS", 0.01)
    served(path, lambda app: asyncio.gather(*(ask(app, f"u{i}") for i in range(6))))
    assert len(kept(path)) == 6


def test_names_and_changes_are_guarded(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    served(path, lambda app: ask(app, "u1"))
    with pytest.raises(ConfigError, match="configured differently"):
        trial(path, replace(E, min_effect=0.2))
    command.end("live", str(path))
    trial(path, replace(E, min_effect=0.2))
    with Store(path) as db:
        db.save_experiment("paper", db.begin("ab", "paper", {}), {}, {})
        assert db.run("live").kind == KIND
    with pytest.raises(ConfigError, match="another name"):
        trial(path, replace(E, name="paper"))
    with Store(path, read_only=True) as db:
        assert [r.kind for r in db.runs() if r.name == "paper"] == ["ab"]
