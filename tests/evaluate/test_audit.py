"""The audit catches and names planted liars, and accuses honest engines no more often than it says."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from outrider.errors import ConfigError
from outrider.evaluate.audit import sources as src
from outrider.evaluate.audit.audit import Auditor, audit
from outrider.evaluate.audit.findings import EXACT, INCONCLUSIVE, NOT_THE_TARGET, AuditOptions, AuditResult
from outrider.evaluate.audit.greedy import audit_greedy
from outrider.evaluate.audit.whitebox import joint_distribution, rounding
from outrider.evaluate.statistics.eprocess import Cells, Component, EProcess, bet, clipped, log_factors
from outrider.models.toy import TableTarget
from outrider.params import SamplingParams
from outrider.verify import LOSSLESS, load_rule
from tests.covering import slow_beyond
from tests.evaluate import liars as lie

BUDGET = 2000
SOON, CAUGHT = 800, 1600
"""Tokens after which the first liar of each family is caught, and every liar."""
FALSE_ALARM = 1e-9


def judge(source: src.Source, params=lie.PLAIN, eos=(), budget=BUDGET, prompts=lie.PROMPTS, **options) -> AuditResult:
    auditor = Auditor(lie.TARGET, lie.DRAFT, AuditOptions(params, **options), eos)
    return audit(source, prompts, auditor, samples=2, budget=budget)


def one_of_each_family() -> Iterator[Any]:
    """The first liar of each family, and those of none; the others are nightly."""
    seen: set[str] = set()
    for liar in lie.LIARS:
        again = bool(liar.family) and liar.family in seen
        seen.add(liar.family or "")
        within = CAUGHT if again else SOON
        yield pytest.param(liar, within, id=liar.name, marks=pytest.mark.slow if again else ())


@pytest.mark.parametrize(("liar", "within"), list(one_of_each_family()))
def test_liar_is_caught_and_named(liar: lie.Liar, within: int) -> None:
    v = judge(liar.source(liar.params), liar.params, liar.eos, within)
    assert v.outcome == NOT_THE_TARGET
    assert v.tokens < within + liar.params.max_tokens  # the last text is read to its end
    if liar.family:
        assert v.alarm_at is not None and v.alarm_at < within
        assert v.cause == liar.family
    else:
        assert v.violations
    assert v.sentence.startswith("not the target's distribution: ")


def test_there_are_enough_liars() -> None:
    assert len({liar.name for liar in lie.LIARS}) >= 15


@pytest.mark.parametrize("params", [lie.PLAIN, lie.STOPPING], ids=["full", "stopping"])
def test_the_honest_twin_of_the_liars_passes(params: SamplingParams) -> None:
    eos = () if params.ignore_eos else (lie.EOS,)
    v = judge(src.of_engine(lie.engine(lie.PlainRule(), eos=eos), params), params, eos, detect=0.15)
    assert v.outcome == EXACT
    assert v.alarm_at is None and v.control_planted > 2
    assert v.resolution is not None and v.resolution <= 0.15


@pytest.mark.parametrize("runs", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_no_false_alarm_in_honest_runs(runs: int) -> None:
    """At most 1% of honest runs may ever alarm; the bound on their number is exceeded with probability below 1e-9."""
    honest = src.of_engine(lie.engine(load_rule("speculative_sampling")), params := SamplingParams(max_tokens=60))
    alarms = 0
    for run in range(runs):
        v = judge(honest, params, prompts=[lie.PROMPTS[run % 20]], level=0.01, seed=run)
        alarms += v.outcome == NOT_THE_TARGET
    assert alarms <= binom.isf(FALSE_ALARM, runs, 0.01)
    assert alarms == 0  # the seeds are fixed: what these runs are known to give


def test_few_tokens_are_inconclusive() -> None:
    v = judge(src.of_engine(lie.engine(lie.PlainRule()), lie.PLAIN), budget=50)
    assert v.outcome == INCONCLUSIVE
    assert v.resolution is None
    assert any(d.tv is None for d in v.detectable)


def test_a_bias_within_the_tolerance_is_not_accused_and_one_outside_is() -> None:
    near, far = (src.of_engine(lie.engine(lie.PlainRule(accept=lie.blend(w))), lie.PLAIN) for w in (0.02, 1.0))
    assert judge(near, tolerance=0.05, detect=0.2).outcome != NOT_THE_TARGET
    assert judge(far, tolerance=0.05, detect=0.2).outcome == NOT_THE_TARGET


def test_factors_have_expectation_at_most_one_over_the_whole_null() -> None:
    """E f = 1 under p, and at most 1 under the distribution within the tolerance that the factor likes best, by enumeration."""
    rng = np.random.default_rng(0)
    for tolerance in (0.0, 0.01, 0.2):
        for _ in range(20):
            p, a = (
                TableTarget.random(6, seed=int(rng.integers(1 << 30)), sharp=2.0).distribution([1])[None]
                for _ in range(2)
            )
            ratio = clipped(p, a, 5.0)
            values = np.stack(
                [np.exp(log_factors(bet(p, ratio, a, p.new_tensor([x]).long()), tolerance))[0] for x in range(6)]
            )
            distribution = p[0].numpy()
            worst = distribution.copy()
            order = np.argsort(values[:, -1])
            moved = 0.0
            for x in order[:-1]:
                take = min(tolerance - moved, worst[x])
                worst[x] -= take
                moved += take
            worst[order[-1]] += moved
            assert (worst @ values <= 1 + 1e-12).all()
            if tolerance == 0:
                assert distribution @ values == pytest.approx(1.0, abs=1e-12)


def test_learnt_cells_keep_expectation_one() -> None:
    cells, mass = Cells(3, 0.0), np.array([0.5, 0.3, 0.2])
    for cell in (0, 0, 2, 1, 0):
        import copy

        values = [np.exp(copy.deepcopy(cells).factor(mass, c)) for c in range(3)]
        assert mass @ np.array(values) == pytest.approx(1.0)
        cells.factor(mass, cell)


def test_evidence_is_the_average_of_its_components() -> None:
    e = EProcess([Component("a", "1"), Component("a", "2"), Component("b", "1")], 0.01)
    assert e.value == pytest.approx(0.0)
    f = np.zeros((1, 3, e.log.shape[1]))
    f[0, 2] = math.log(10.0)
    e.update(f)
    assert e.value == pytest.approx(math.log(0.5 * 1 + 0.5 * 10))
    assert list(e.families()) == ["b", "a"]


# ----------------------------------------------------------------- greedy text, and the engine from inside
def test_greedy_text_is_judged_by_its_margin() -> None:
    params = SamplingParams(temperature=0, max_tokens=20)
    honest = src.of_engine(lie.engine(load_rule("speculative_sampling")), params)
    assert audit_greedy(honest, lie.PROMPTS, lie.TARGET).outcome == EXACT
    wrong = audit_greedy(
        src.of_engine(lie.engine(lie.PlainRule(accept=lambda p, q, x: 1.0)), params), lie.PROMPTS, lie.TARGET
    )
    assert wrong.wrong and all(d.gap > 2 * d.delta for d in wrong.wrong)


def test_a_tie_is_not_a_mistake() -> None:
    table = TableTarget.random(6, seed=1).table.clone()
    table[..., 2] = table[..., 4] = 9.0
    target = TableTarget(table[0])
    other = src.of_callable(lambda prompt, seed: [4] * 5)
    v = audit_greedy(other, [[1]], target)
    assert v.departures and not v.wrong


@pytest.mark.parametrize("name", slow_beyond([(name,) for name in LOSSLESS], [("match",), ("speculative_sampling",)]))
def test_joint_distribution_of_the_shipped_rules(name: str) -> None:
    """Both ways to draft that it has; every rule, and on more texts: tests/contract/test_joint_law.py."""
    assert joint_distribution(load_rule(name), sequences=1500).p_value > FALSE_ALARM


@pytest.mark.parametrize(
    "rule", [lie.PlainRule(correct=lambda p, q: p), lie.PlainRule(coin="final")], ids=["residual", "noise"]
)
def test_joint_distribution_of_a_broken_rule(rule: lie.PlainRule) -> None:
    assert joint_distribution(rule, sequences=4000).p_value < FALSE_ALARM


def test_rounding_of_a_float64_table_is_nothing() -> None:
    assert rounding(lie.TARGET, list(range(1, 20))) < 1e-12


# ----------------------------------------------------------------- where text comes from
class _Server(BaseHTTPRequestHandler):
    ids = True
    breaks_at = None
    asked = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        _Server.asked += 1
        if self.breaks_at is not None and self.asked > self.breaks_at:
            self.send_error(503)
            return
        text = lie.src_honest(body["prompt"], body["seed"], body["max_tokens"])
        words = [f"token_id:{t}" if self.ids else "word" for t in text]
        book = {"tokens": words, "token_logprobs": [-1.0] * len(text)}
        raw = json.dumps({"choices": [{"text": "", "logprobs": book}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server():
    one = HTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=one.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{one.server_port}"
    one.shutdown()
    one.server_close()
    thread.join()
    _Server.ids, _Server.breaks_at, _Server.asked = True, None, 0


def test_a_server_that_breaks_down_loses_nothing(server: str) -> None:
    """Requests that fail after the first answer are failed texts; what came before is judged."""
    _Server.breaks_at = 9
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    v = judge(src.of_endpoint(src.Endpoint(server, "toy", concurrency=1), params), params, prompts=lie.PROMPTS[:8])
    assert (v.texts, v.failed, v.outcome) == (9, 7, INCONCLUSIVE)
    with pytest.raises(ConfigError, match="503"):
        src.of_endpoint(src.Endpoint(server, "toy"), params)([[1]], [1])


def test_a_server_is_audited_over_http(server: str) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    source = src.of_endpoint(src.Endpoint(server, "toy"), params)
    v = judge(source, params, prompts=lie.PROMPTS[:8])
    assert v.tokens == 320 and v.outcome != NOT_THE_TARGET
    assert v.law_gap is not None
    liar = judge(source, SamplingParams(temperature=0.5, max_tokens=20, ignore_eos=True), prompts=lie.PROMPTS)
    assert liar.outcome == NOT_THE_TARGET


def test_bad_servers_end_in_a_sentence(server: str) -> None:
    params = SamplingParams(max_tokens=4)
    _Server.ids = False
    with pytest.raises(ConfigError, match="no token ids"):
        src.of_endpoint(src.Endpoint(server, "toy"), params)([[1]], [1])
    with pytest.raises(ConfigError, match="cannot be reached"):
        src.of_endpoint(src.Endpoint("http://127.0.0.1:9", "toy"), params)([[1]], [1])
    with pytest.raises(ConfigError, match="not an http"):
        src.of_endpoint(src.Endpoint("file:///etc/passwd", "toy"), params)([[1]], [1])


def test_a_failing_callable_is_a_failed_text() -> None:
    def broken(prompt: list[int], seed: int) -> list[int]:
        raise RuntimeError("no")

    v = judge(src.of_callable(broken))
    assert v.failed == 40 and v.outcome == INCONCLUSIVE


def test_recorded_texts_are_read_and_bad_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    rows = [{"prompt_token_ids": [1, 2], "token_ids": [3, 4]}, {"prompt_token_ids": [1, 2], "token_ids": [5, 6]}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    recorded = src.read_texts(path)
    assert recorded.samples == 2
    assert [e.tokens for e in recorded.source()([[1, 2], [1, 2]], [0, 1])] == [(3, 4), (5, 6)]
    path.write_text('{"prompt_token_ids": [1]}\n')
    with pytest.raises(ConfigError, match=r"texts\.jsonl:1"):
        src.read_texts(path)
