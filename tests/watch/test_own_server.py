"""Our own server, watched from outside: its figures are a recount of what clients received and of the server's own sums."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from outrider.assets import __file__ as assets
from outrider.errors import ConfigError
from outrider.evaluate.audit.findings import NOT_THE_TARGET, AuditOptions
from outrider.evaluate.audit.sources import Endpoint, of_endpoint, read_choice
from outrider.evaluate.store.store import Store
from outrider.integrations.watch import Watch
from outrider.integrations.watch.acceptance import of_reply
from outrider.integrations.watch.app import Watching, create_app, server_for
from outrider.integrations.watch.asking import Asking, Budget, asking
from outrider.integrations.watch.log import Log
from outrider.params import SamplingParams
from outrider.serve.address import reserve
from outrider.web import get
from tests.serve.harness import KEY, Running, serving, until
from tests.serve.toyserver import BODY, V, toy
from tests.watch.server import PAGES, fake, ok, status
from tests.watch.test_watcher import Clock, tick


def completed(running: Running, seed: int | None, key: str = KEY) -> dict[str, Any]:
    body = {k: v for k, v in BODY.items() if k != "stream"} | {"seed": seed}
    code, _, data = running.call("POST", "/v1/completions", body, {"Authorization": f"Bearer {key}"})
    assert code == 200
    return json.loads(data)


def test_figures_are_a_recount(tmp_path: Path) -> None:
    with serving(engine=toy(4, sure=2.0), fixed=True, keys=(KEY,)) as running:
        clock = Clock()
        watch = Watch(running.url + "/metrics", KEY, clock=clock)
        tick(watch, clock)
        log = Log(tmp_path / "w.db", "toy", watch, every=4.0)
        log.tick()
        replies = [completed(running, n or None) for n in range(8)]
        tick(watch, clock, 3)
        assert log.tick()
        s, c = watch.recent(), running.bridge.metrics.counts
        tokens = sum(r["usage"]["completion_tokens"] for r in replies)
        drafted = [r["metrics"]["speculative_decoding"] for r in replies]
        assert s.get("emitted") == tokens == c.emitted and s.get("passes") == c.steps
        assert s.tokens_per_pass == tokens / c.steps
        assert s.get("drafts") == sum(d["num_spec_steps"] for d in drafted)
        assert s.get("accepted") == sum(d["num_accepted_draft_tokens"] for d in drafted)
        rejected = sum(x["rejections"] for r in replies for x in r["metrics"]["outrider"])
        assert s.rejections() == (rejected, rejected) and s.get("risk") == pytest.approx(c.risk)
        assert s.judged_at() == c.judged_at and s.at("accepted_at") == c.accepted_at
        reading = watch.reading()
        assert (reading["engine"], reading["model"]) == ("Outrider", "pycode") and reading["since_start"]["ended"][
            "length"
        ] == 8
        own = sum(x["rejections"] for x in replies[0]["metrics"]["outrider"])  # the one without a seed of its own
        assert watch.state()["ledger"]["observed"] == own < rejected and watch.state()["ledger"]["agrees"]
        log.close()
        with Store(tmp_path / "w.db") as store:
            run = store.run("toy")
            assert (run.kind, run.state) == ("watch", "done") and run.summary is not None
            assert store.ledgers(run.id)["Outrider"]["rejected"] == rejected
            assert sum(d["tokens"] for d in store.records(run.id).values()) == tokens


def test_acceptance_of_our_replies_is_read() -> None:
    with serving(engine=toy(4, sure=2.0), fixed=True, keys=(KEY,)) as running:
        document = completed(running, 1)
    found = of_reply(document)
    spec = document["metrics"]["speculative_decoding"]
    assert found is not None
    assert (found.drafts, found.accepted) == (spec["num_spec_steps"], spec["num_accepted_draft_tokens"])
    assert found.judged_at[0] == found.drafts and sum(found.accepted_at) == found.accepted


def asked_of(
    running: Running, *, total: int, sure: float, rate: float = 1e9, samples: int = 2
) -> tuple[Asking, list[str]]:
    """Requests to a toy server, audited against a target that is `sure`; sampling ids 0..15."""
    from outrider.evaluate.audit.audit import Auditor

    watch, said = Watch(running.url), list[str]()
    watch.once()
    params = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True)
    target = toy(1, sure=sure).parts.target
    draft = toy(1, sure=1.0).parts.target  # its first choice is the last token, which is what the server drafts
    auditor = Auditor(target, draft, AuditOptions(params))
    prompts = [[n % V, 3] for n in range(5)]
    made = asking(watch, prompts, params, Budget(total, rate), auditor, samples=samples, say=said.append)
    return made, said


def test_the_audit_stays_in_its_budget_and_accuses_only_the_wrong_target() -> None:
    with serving(engine=toy(4, sure=2.0), fixed=True) as running:
        right, said = asked_of(running, total=1000, sure=2.0)
        while right.step() is not None:
            pass
        assert (
            right.budget.spent == right.tokens == 960 and right.answered == 24
        )  # twelve prompts; the next two texts need 80
        assert running.bridge.metrics.counts.emitted == 960 and said == ["the budget of 1000 tokens is spent"]
        assert right.verdict is not None and not right.accused and right.verdict.tokens == 960
        found = right.document()
        assert found["acceptance"]["requests"] == 24 and len(found["acceptance"]["by_length"]) == 5
        replay = found["replay"]
        assert (replay["texts"], replay["length"]) == (24, 3)
        assert replay["greedy"][0] == pytest.approx(replay["observed"]) and replay["greedy"][1] == replay["greedy"][2]
        assert not replay["sampled"][1] <= replay["observed"] <= replay["sampled"][2]  # it does not draw its drafts
        wrong, _ = asked_of(running, total=2000, sure=1.0)
        while wrong.step() is not None and not wrong.accused:
            pass
        assert wrong.verdict is not None and wrong.verdict.outcome == NOT_THE_TARGET


def test_an_audit_by_address_reads_a_server_that_refuses_fields_it_does_not_know() -> None:
    """Ours knows no `return_tokens_as_token_ids`, which vLLM needs: it is left out once it has been refused."""
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    with serving(engine=toy(2), fixed=True) as running:
        found = of_endpoint(Endpoint(running.url, "pycode"), params, V)([[1, 3], [2, 3], [3, 3]], [1, 2, 3])
    assert [len(e.tokens) for e in found] == [5, 5, 5] and not any(e.error for e in found)


def test_token_ids_of_llamacpps_completions_are_read_without_its_logprobs() -> None:
    content = [{"id": 7, "token": "a", "logprob": -1.5}, {"id": 9, "token": "b", "logprob": 0.0}]
    found = read_choice({"text": "ab", "logprobs": {"content": content}}, 2, V)
    assert (found.tokens, found.logprobs) == ((7, 9), ())
    with pytest.raises(ConfigError, match="no token ids"):
        read_choice({"text": "ab", "logprobs": {"content": [{"token": "a"}]}}, 2, V)


def test_the_rate_is_kept() -> None:
    now = [0.0]
    budget = Budget(1000, 60.0, clock=lambda: now[0])
    assert budget.wait(100) == 0.0
    budget.spent = 100
    assert budget.wait(100) == 100.0  # a token a second
    now[0] = 99.0
    assert budget.wait(100) == 1.0
    assert budget.wait(901) is None


def test_requests_end_when_the_server_cannot_answer_them() -> None:
    """Without token ids there is nothing to audit: one request, and its sentence."""
    completion = {"choices": [{"text": "x"}], "usage": {"completion_tokens": 1}}
    with serving(engine=toy(2), fixed=True) as running, fake() as server:
        page = running.call("GET", "/metrics")[2]
        server.answer = lambda path, request: (
            ok(page)
            if path == "/metrics"
            else ok(json.dumps(completion), "application/json")
            if path == "/v1/completions"
            else status(404)
        )
        lies: Any = Running(server.port, None, None, None, None)  # type: ignore[arg-type]
        made, said = asked_of(lies, total=1000, sure=0.0)
        assert made.step() is None and made.step() is None
        assert made.failed == 1 and "no token ids" in said[0] and made.budget.spent == 40


@contextmanager
def shown(watching: Watching) -> Iterator[str]:
    """The page of a watch on a port of its own."""
    listener = reserve("127.0.0.1", 0)
    server = server_for(create_app(watching), "127.0.0.1", 0)
    watching.open()
    thread = threading.Thread(target=lambda: server.run([listener]))
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def read(url: str) -> Any:
    return json.loads(get(url, seconds=10, most=1 << 22).body)


def test_the_page_serves_what_the_watch_knows(tmp_path: Path) -> None:
    with serving(engine=toy(2, sure=2.0), fixed=True) as running:
        running.call("POST", "/v1/completions", {k: v for k, v in BODY.items() if k != "stream"})
        watch = Watch(running.url)
        with shown(Watching(watch, every=0.05, log=lambda: Log(tmp_path / "w.db", "w", watch))) as url:
            until(lambda: len(watch.history) > 3)
            assert b"Requests of this watch" in get(url, seconds=10, most=1 << 22).body
            state = read(f"{url}/outrider/state?after=0")
            assert state["server"]["engine"] == "Outrider" and state["now"]["emitted"] == 60 and not state["store"]
            assert (
                {"speeds", "requests", "play"}
                <= set(state["server"]["missing"])
                <= {*("speeds", "requests", "play", "speedup", "length")}
            )
            assert read(f"{url}/outrider/reading")["since_start"]["tokens"] == 60
            page: Any = Running(int(url.rpartition(":")[2]), None, None, None, None)  # type: ignore[arg-type]
            assert page.call("GET", "/outrider/runs")[0] == 404
            assert page.call("GET", "/outrider/state?after=x")[0] == 400
            code, headers, _ = page.call("GET", "/", headers={"Host": "evil.example"})
            assert code == 403 and headers["x-frame-options"] == "DENY"
            code, headers, _ = page.call("GET", "/")
            assert code == 200 and "script-src" in headers["content-security-policy"]
    with Store(tmp_path / "w.db") as store:
        assert store.run("w").state == "done"


def test_a_page_for_others_is_refused() -> None:
    with pytest.raises(ConfigError, match="loopback"):
        server_for(create_app(Watching(Watch("http://127.0.0.1:1"))), "0.0.0.0", 0)


# ------------------------------------------------------------------ the command
def test_once_prints_one_reading_for_programs_and_for_people(run: Any) -> None:
    with fake(PAGES["vllm"]) as server:
        code, text = run("watch", server.url, "--once", "--json")
        document = json.loads(text)
        assert code == 0 and document["since_start"]["tokens_per_pass"] == 150 / 48 and document["engine"] == "vLLM"
        code, text = run("watch", server.url, "--once")
        assert code == 0 and "tokens per pass      3.125" in text and "where it drafted     3.400" in text
        assert "it does not tell" in text and "by draft length      1.93, 2.67, 3.40 tokens" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("http://127.0.0.1:9", "--once"), "cannot be reached"),
        (("nowhere", "--once"), "not an http or https address"),
        (("http://127.0.0.1:9", "--once", "--budget", "5"), "leave out --store"),
        (("http://127.0.0.1:9", "--target", str(Path(assets).parent / "pycode" / "target")), "add --budget"),
        (("http://127.0.0.1:9", "--draft", "none:x", "--budget", "500"), "add --target"),
        (("http://127.0.0.1:9", "--model", "m"), "add --budget"),
        (("http://127.0.0.1:9", "--name", "n"), "add --store"),
        (("http://127.0.0.1:9", "--budget", "127"), "2 answers of up to --max-tokens 64"),
    ],
)
def test_wrong_use_is_one_sentence(run: Any, words: tuple[str, ...], said: str) -> None:
    code, text = run("watch", *words)
    assert code == 2 and said in text and len(text.strip().splitlines()) == 1


def test_the_python_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "watch.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    with fake(PAGES["vllm"]) as server:
        for block in blocks:
            exec(compile(block.replace("http://127.0.0.1:8000", server.url), "docs/watch.md", "exec"), {})
    assert blocks and capsys.readouterr().out.startswith("vLLM 3.125\n")


def test_the_command_watches_until_it_is_told_to_end(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "outrider", "watch"]
    with fake(PAGES["vllm"]) as server:
        words += [server.url, "--port", "0", "--every", "0.2", "--json", "--store", str(tmp_path / "w.db")]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            lines = [json.loads(process.stdout.readline()) for _ in range(3)]
            server.answer = lambda path, request: None  # it dies while it is watched
            while json.loads(process.stdout.readline())["answers"]:
                pass
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        assert process.returncode == 0 and "page on http://127.0.0.1:" in said and "Traceback" not in said
    assert all(line["since_start"]["tokens_per_pass"] == 150 / 48 for line in lines)
    with Store(tmp_path / "w.db") as store:
        run = store.runs()[0]
        assert run.state == "done" and run.summary is not None and run.summary["engine"] == "vLLM"
        assert sum(d["counts"]["rejected"] for d in store.records(run.id).values()) == 0  # nobody predicted them
