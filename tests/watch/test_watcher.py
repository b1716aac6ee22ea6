"""A watch outlives what servers do: restarts, metrics that vanish, garbled pages, silence; each is said once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outrider.errors import ConfigError
from outrider.integrations.watch import Watch
from outrider.integrations.watch.watcher import KEPT
from tests.watch.server import PAGES, Fake, fake, ok, status
from tests.watch.test_page import garbled


class Clock:
    """Two seconds a reading."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


def watch_of(server: Fake, **more: Any) -> tuple[Watch, list[str], Clock]:
    said: list[str] = []
    clock = Clock()
    return Watch(server.url, say=said.append, clock=clock, **more), said, clock


def tick(watch: Watch, clock: Clock, times: int = 1) -> list[str]:
    """Readings, two seconds apart; the names of alerts that began (and with a minus those that ended)."""
    names = []
    for _ in range(times):
        clock.now += 2.0
        names += [("" if n.firing else "-") + n.name for n in watch.tick()]
    return names


def llama(tokens: int, drafts: int, accepted: int) -> str:
    text = PAGES["llamacpp"].replace("tokens_predicted_total 20", f"tokens_predicted_total {tokens}")
    text = text.replace("num_drafts_total 12", f"num_drafts_total {drafts}")
    text = text.replace("draft_tokens_total 44", f"draft_tokens_total {4 * drafts}")
    return text.replace("accepted_tokens_total 6", f"accepted_tokens_total {accepted}").replace(
        '"0"} 6', f'"0"}} {accepted}'
    )


def test_sums_go_on_over_a_restart() -> None:
    with fake(llama(100, 40, 30)) as server:
        watch, said, clock = watch_of(server)
        tick(watch, clock, 2)
        server.serves(llama(160, 60, 45))
        assert tick(watch, clock) == []
        server.serves(llama(10, 4, 3))  # began anew
        assert tick(watch, clock) == ["server_restarted"]
        server.serves(llama(30, 12, 9))
        tick(watch, clock)
        whole = watch.lifetime()
        assert whole.get("emitted") == 160 + 30 and whole.get("drafts") == 60 + 12 and whole.get("accepted") == 45 + 9
        assert watch.reading()["restarts"] == 1 and len(said) == 1 and "begun anew" in said[0]
        assert all(
            s.sums["emitted"] <= t.sums["emitted"] for s, t in zip(watch.history, list(watch.history)[1:], strict=False)
        )
        assert tick(watch, clock, 40) == ["-server_restarted"]
        server.serves(llama(1, 1, 0))
        tick(watch, clock)
        assert len(said) == 1 and watch.faults["restart"] == 2


def test_a_birth_shows_a_restart_that_no_counter_shows() -> None:
    born = "process_start_time_seconds {}\n"
    with fake(PAGES["vllm"] + born.format(1000.0)) as server:
        watch, _, clock = watch_of(server)
        tick(watch, clock)
        server.serves(PAGES["vllm"].replace("process_start", "x_process_start") + born.format(1.9e9))
        tick(watch, clock)
        assert watch.reading()["restarts"] == 1 and watch.lifetime().get("emitted") == 300


def test_several_servers_behind_one_address_are_named() -> None:
    with fake() as server:
        watch, said, clock = watch_of(server)
        for _ in range(6):
            for tokens in (5000, 100):
                server.serves(llama(tokens, 40, 30))
                tick(watch, clock)
        assert any("several servers answer at this address" in s for s in said) and len(said) == 2


def test_a_metric_that_vanishes_stands_still_and_comes_back() -> None:
    gone = "\n".join(line for line in llama(160, 60, 45).splitlines() if "num_drafts" not in line) + "\n"
    with fake(llama(100, 40, 30)) as server:
        watch, said, clock = watch_of(server)
        tick(watch, clock)
        server.serves(gone)
        tick(watch, clock, 5)
        assert watch.lifetime().get("emitted") == 160 and watch.lifetime().get("drafts") == 40
        assert said == ["'drafts' has vanished from its metrics: figures that need it stand still"]
        server.serves(llama(200, 80, 60))
        tick(watch, clock)
        assert watch.lifetime().get("drafts") == 80 and watch.reading()["restarts"] == 0 and len(said) == 1


def test_a_thousand_garbled_pages_end_nothing_and_are_said_once() -> None:
    """Every kind of fault is said once; when the pages are good again, so are the figures."""
    with fake() as server:
        watch, said, clock = watch_of(server)
        server.serves(llama(100, 40, 30))
        tick(watch, clock, 2)
        bodies = iter([garbled(n) for n in range(1000)])
        server.answer = lambda path, request: ok(next(bodies, b"")) if path == "/metrics" else status(404)
        names = tick(watch, clock, 1000)
        assert len(said) == len(set(said)) <= 50 and len(watch.problems) == len(said)
        assert sum(watch.faults.values()) > 300 and len(watch.history) <= KEPT
        json.dumps(watch.reading(), allow_nan=False), json.dumps(watch.state(), allow_nan=False)
        server.serves(llama(10**9, 10**8, 10**8))
        names += tick(watch, clock, 60)
        assert watch.answers and names.count("server_silent") == names.count("-server_silent")
        server.serves(llama(10**9 + 600, 10**8 + 100, 10**8 + 300))
        tick(watch, clock, 20)
        assert watch.recent().tokens_per_pass == pytest.approx(2.0)


@pytest.mark.parametrize(
    "part", ["num_drafts_total", "num_draft_tokens_total", "n_decode_total", 'pos_total{position="0"}']
)
def test_counts_so_small_that_their_ratios_are_no_numbers_are_unknown(part: str) -> None:
    """The record and the page are JSON, which has no infinity: one such page stopped every reading after it."""
    tiny = "\n".join(
        f"{line.rpartition(' ')[0]} 1e-320" if part in line and line[0] != "#" else line
        for line in llama(10**9, 10**8, 10**8).split("\n")
    )
    heard = list[str]()
    with fake() as server:
        watch, _, clock = watch_of(server, heard=lambda reading: heard.append(json.dumps(reading, allow_nan=False)))
        server.serves(tiny)
        tick(watch, clock, 2)
        state = json.loads(json.dumps(watch.state(), allow_nan=False))
        assert watch.answers and len(heard) == 2 and "1e-320" in tiny
        assert state["now"]["emitted"] == json.loads(heard[-1])["since_start"]["tokens"] == 10**9


def test_silence_is_an_alert_that_ends() -> None:
    with fake(PAGES["vllm"]) as server:
        watch, said, clock = watch_of(server, seconds=0.3)
        tick(watch, clock, 3)
        server.answer = lambda path, request: None
        assert tick(watch, clock, 5) == ["server_silent"]
        assert watch.reading()["alerts"] == ["server_silent"] and not watch.reading()["answers"]
        server.serves(PAGES["vllm"])
        assert tick(watch, clock, 5) == ["-server_silent"]
        assert len(said) == 1 and watch.reading()["restarts"] == 0


@pytest.mark.parametrize("way", ["hang", "drip", "headers"])
def test_a_server_that_hangs_or_trickles_is_left_in_time(way: str) -> None:
    with fake(PAGES["vllm"]) as server:
        server.hang, server.drip = way == "hang", 0.02 if way == "drip" else 0.0
        if way == "headers":
            server.drip = 0.02
            server.answer = lambda path, request: b"HTTP/1.1 200 OK\r\n" + b"X-Y: z\r\n" * 500
        watch, said, clock = watch_of(server, seconds=0.4)
        tick(watch, clock)
        assert not watch.answers and watch.faults == {"slow": 1} and "no whole answer within 0.4 s" in said[0]


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (status(307, "Location: http://elsewhere.example/metrics"), "elsewhere", "redirects are not followed"),
        (status(401, body="key needed"), "refused", "key needed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\nvllm:x 1\n", "cut", "broke off"),
        (b"\x00\xff\x00 nothing of HTTP\r\n\r\n", "silent", "cannot be reached"),
        (ok("<html>hello</html>\n"), "unknown", "no metrics that watch knows"),
        (status(503, body="loading"), "refused", "loading"),
    ],
)
def test_answers_that_are_none_are_faults_with_words(answer: bytes, kind: str, words: str) -> None:
    with fake() as server:
        server.answer = lambda path, request: answer if path == "/metrics" else status(404)
        watch, said, clock = watch_of(server)
        tick(watch, clock, 3)
        assert watch.faults == {kind: 3} and len(said) == 1 and words in said[0]
        with pytest.raises(ConfigError, match=words):
            watch.once()


def test_a_page_without_end_is_left() -> None:
    with fake() as server:
        server.answer = lambda path, request: b"HTTP/1.1 200 OK\r\n\r\n" + b"# nothing\n" * 600_000
        watch, said, clock = watch_of(server)
        tick(watch, clock)
        assert watch.faults == {"large": 1} and "more than 4 MiB" in said[0]


def test_the_key_goes_to_the_address_and_nowhere_else() -> None:
    heads: list[str] = []

    def elsewhere_answer(path: str, request: str) -> bytes:
        heads.append(request)
        return ok(PAGES["vllm"])

    with fake() as server, fake() as elsewhere:
        elsewhere.answer = elsewhere_answer
        ours: list[str] = []

        def answer(path: str, request: str) -> bytes:
            ours.append(request)
            return status(302, f"Location: {elsewhere.url}/metrics")

        server.answer = answer
        watch, said, clock = watch_of(server, key="secret-key")
        tick(watch, clock)
        assert "Authorization: Bearer secret-key" in ours[0] and heads == []
        assert "secret-key" not in repr(watch) + "".join(said) + json.dumps(watch.reading())


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [("/props", {"total_slots": 1}, "start it with --metrics"), ("/server_info", {"tp_size": 1}, "--enable-metrics")],
)
def test_a_server_without_metrics_is_named_with_what_to_do(path: str, body: dict[str, Any], words: str) -> None:
    with fake() as server:
        server.answer = lambda p, request: ok(json.dumps(body), "application/json") if p == path else status(404)
        watch, _, _ = watch_of(server)
        with pytest.raises(ConfigError, match=words):
            watch.once()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://user:pw@host:1"])
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        Watch(url)
    assert Watch("http://host:1/v1/").url == Watch(" http://host:1/metrics ").url == "http://host:1"


def test_alerts_are_those_that_its_sums_can_judge() -> None:
    names = {}
    for engine in ("vllm", "sglang", "llamacpp"):
        with fake(PAGES[engine]) as server:
            watch, _, clock = watch_of(server)
            tick(watch, clock)
            names[engine] = {str(row["name"]) for row in watch.alerts.table()}
    assert all({"server_silent", "server_restarted", "few_drafts"} <= found for found in names.values())
    assert "rejections_above_break_even" in names["vllm"] and "rejections_above_break_even" not in names["sglang"]
    assert not any({"not_exact", "audit_alarm", "quality_spent"} & found for found in names.values())


def test_drafts_that_are_rejected_fire_and_clear() -> None:
    """Nine rejections in ten and more are too many for any draft; with acceptance back, the alert ends."""
    with fake(llama(0, 0, 0)) as server:
        watch, _, clock = watch_of(server)
        tick(watch, clock)
        names, tokens, drafts, accepted = [], 0, 0, 0
        for share in [0.02] * 70 + [0.9] * 90:
            drafts += 50
            accepted += round(50 * share)
            tokens += 50 + round(50 * share)
            server.serves(llama(tokens, drafts, accepted).replace("draft_tokens_total", "draft_tokens_total"))
            names += tick(watch, clock)
        assert names.count("rejections_above_break_even") == names.count("-rejections_above_break_even") == 1
