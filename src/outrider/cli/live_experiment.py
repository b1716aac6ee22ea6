"""Experiments on live traffic for the commands: rehearsals, and how it stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outrider.cli import terminal
from outrider.cli.engine_options import load_engine
from outrider.cli.experiment_print import ratio_of
from outrider.errors import CapacityError
from outrider.options import EngineOptions

ROOM = 8
"""Requests of a rehearsal that are in the server at once."""
Prompted = Callable[[Any], list[list[int]]]
"""From an engine to the tokens of the prompts that it is asked."""


# ----------------------------------------------------------------- rehearsals
async def rehearse(app: Any, model: str, prompts: Prompted, requests: int, users: int, tokens: int) -> int:
    """Send `requests` requests of `users` users through the application, without a socket; how many were answered. prompts: what
    the application's engine is to be asked, as its target takes it."""
    import asyncio

    room = asyncio.Semaphore(ROOM)

    async def one(i: int, prompt: list[int]) -> int:
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "user": f"user {i % users}"}
        async with room:
            return (await post(app, "/v1/completions", body))[0]

    async with app.router.lifespan_context(app):
        asked = prompts(app.state.bridge.engine)
        statuses = await asyncio.gather(*(one(i, asked[i % len(asked)]) for i in range(requests)))
    return sum(status == 200 for status in statuses)


async def post(app: Any, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Any:
    """One POST through an ASGI application: status, headers, body."""
    from outrider.serve.replicas.calls import Call
    from outrider.serve.replicas.inside import answer

    given = {"content-type": "application/json", **(headers or {})}
    named = tuple((k.encode(), v.encode()) for k, v in given.items())
    parts = [p async for p in answer(app, Call("POST", path, b"", named, json.dumps(body).encode()))]
    found = {k.decode(): v.decode() for k, v in parts[0].headers}
    return parts[0].status, found, b"".join(p.body for p in parts)


def run_rehearsal(file: Path, store: str, requests: int, users: int, options: EngineOptions, tokens: int) -> str:
    """Serve an experiment in this process to users that are made up; the name under which it is kept."""
    import asyncio

    from outrider.evaluate.experiments.experiment import read_experiment
    from outrider.evaluate.experiments.live import trial_from
    from outrider.serve.app import create_app
    from outrider.serve.settings import Settings, model_name

    e = read_experiment(file)
    name, served = f"{file.stem} rehearsal", options.changed(target=e.target)
    prompts = prompts_of(e)
    trial = trial_from(e, store, served, fixed=True, name=name)
    app = create_app(
        lambda **wiring: load_engine(served, **wiring),
        Settings(model_name(e.target)),
        adaptive=False,
        trial=trial,
    )
    answered = asyncio.run(rehearse(app, model_name(e.target), prompts, requests, users, tokens))
    end(name, store)
    if answered < requests:
        raise CapacityError(f"{requests - answered} of {requests} requests were refused: see `ab status`")
    return name


def prompts_of(e: Any) -> Prompted:
    """The prompts of an experiment, as they are taken by `ab run`; which they were is said. What cannot be read is said before a
    model is loaded."""
    from outrider.evaluate.workloads import load_rows, ready, told

    path = Path(e.prompts) if e.prompts else None
    rows = load_rows(path, e.count)

    def taken(engine: Any) -> list[list[int]]:
        found = ready(engine, path, rows, e.chat_template)
        terminal.say(f"prompts: {told(found.data)}")
        return found.ids

    return taken


# ----------------------------------------------------------------- how it stands
def is_live(name: str, store: str) -> bool:
    """Whether an experiment of a store is one on live traffic."""
    from outrider.evaluate.store.store import Store

    with Store(store, read_only=True) as db:
        kind = db.run(db.experiment(name)[0]).kind
    from outrider.evaluate.experiments.live import KIND  # after the store has been found: it imports PyTorch

    return kind == KIND


def end(name: str, store: str) -> None:
    """Close an experiment, so that its name is free for another. Raises ConfigError while a server runs it."""
    from dataclasses import asdict

    from outrider.evaluate.experiments.live import KIND, read
    from outrider.evaluate.store.store import Store

    status = read(name, store)[2]
    with Store(store) as db:
        run, config, _ = db.experiment(name)
        if db.run(run).state == "running":
            db.begin(KIND, name, config)  # it is ours now, or refused while another process writes it
            db.finish(run, asdict(status))


def document(name: str, store: str) -> dict[str, Any]:
    """An experiment on live traffic as plain data."""
    from outrider.evaluate.experiments.assignment import shares_of
    from outrider.evaluate.experiments.live import read
    from outrider.telemetry.ledger import ledger

    e, tally, status = read(name, store)
    arms = []
    for arm, side in tally.arms.items():
        book = ledger(side.engine_seeded)
        arms.append(
            {
                "arm": arm,
                "share": shares_of(e)[arm],
                "requests": side.requests,
                "units": len(side.units),
                "values": len(side.values),
                "tokens": side.tokens,
                "tokens_per_second": side.later / side.seconds if side.seconds else None,
                "rejections": {"predicted": book.predicted, "observed": book.observed, "agrees": book.agrees},
                "lossless": arm not in e.lossy and not side.engine_seeded.bias,
                "total_variation": side.engine_seeded.bias,
                "outcomes": side.outcomes,
                "stopped": arm in status.stopped,
            }
        )
    comparisons = [
        {
            "arm": c.arm,
            "decision": c.decision,
            "pairs": c.speed.n,
            "speedup": ratio_of(c.speed),
            "vetoes": list(c.vetoes),
        }
        for c in status.comparisons
    ]
    return {"experiment": name, "live": True, "base": e.base, "arms": arms, "comparisons": comparisons}
