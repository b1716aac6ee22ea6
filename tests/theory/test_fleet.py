"""The simulated fleet: equal to a plain simulation of every step, to Lindley's recursion, and to the formulas of queueing theory.

Statistical tests use means of 30 batches and raise a false alarm with probability one in a billion at most (Student's t).
"""

from __future__ import annotations

import doctest
import heapq
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtrit

from outrider.theory.fleet import FAILED, OK, REFUSED, Failures, Replica, Traffic, poisson, simulate


def cost(decoding: int, length: int, rows: int) -> float:
    """A step of a made-up machine."""
    return 0.01 + 0.001 * decoding * (1 + length) + 0.0004 * length + 0.0001 * rows


def agrees(values: np.ndarray, expected: float) -> bool:
    """Whether the mean of a correlated sequence is `expected`, by 30 batches."""
    batches = values[: len(values) // 30 * 30].reshape(30, -1).mean(1)
    error = batches.std(ddof=1) / math.sqrt(30)
    return bool(abs(batches.mean() - expected) < stdtrit(29, 1 - 0.5e-9) * error)


def by_every_step(traffic: Traffic, replica: Replica, replicas: int) -> tuple[np.ndarray, np.ndarray]:
    """The same fleet, one step after another; acceptances must be 0 or 1. A plain twin of `simulate`."""
    n, slots, chunk = len(traffic.arrival), replica.slots, replica.chunk
    first, end = np.full(n, np.nan), np.full(n, np.nan)
    waiting: list[list[int]] = [[] for _ in range(replicas)]
    running: list[dict[int, list[int]]] = [{} for _ in range(replicas)]  # request -> prompt tokens and tokens to come
    clock = [math.inf] * replicas  # end of the step under way
    work: list[dict[int, int]] = [{} for _ in range(replicas)]
    turn, i = 0, 0

    def start(r: int, now: float) -> None:
        while waiting[r] and len(running[r]) < slots:
            k = waiting[r].pop(0)
            running[r][k] = [int(traffic.prompt[k]), int(traffic.output[k])]
        if not running[r]:
            clock[r] = math.inf
            return
        length = replica.lengths[min(len(running[r]), len(replica.lengths) - 1)]
        budget, rows, work[r] = chunk, 0, {}
        for k, (missing, _left) in running[r].items():
            if missing:
                part = min(missing, chunk - (int(traffic.prompt[k]) - missing) % chunk)
                if part <= budget or budget == chunk:
                    budget -= part
                    rows += part
                    work[r][k] = part
            else:
                reached = list(replica.acceptance[:length]).index(0) if 0 in replica.acceptance[:length] else length
                work[r][k] = -(1 + reached)
        decoding = sum(w < 0 for w in work[r].values())
        clock[r] = now + replica.seconds(decoding, length, rows)

    while i < n or min(clock) < math.inf:
        r = int(np.argmin(clock))
        if i < n and traffic.arrival[i] <= clock[r]:
            opened = [len(waiting[x]) + len(running[x]) for x in range(replicas)]
            order = [(x + turn) % replicas for x in range(replicas)]
            r = min(order, key=lambda x: opened[x])
            turn += 1
            waiting[r].append(i)
            if clock[r] == math.inf:
                start(r, float(traffic.arrival[i]))
            i += 1
            continue
        now = clock[r]
        for k, w in work[r].items():
            if w > 0:
                running[r][k][0] -= w
                if running[r][k][0] == 0:
                    first[k], running[r][k][1] = now, running[r][k][1] - 1
            else:
                running[r][k][1] += w
            if running[r][k][1] <= 0:
                end[k] = now
                del running[r][k]
        start(r, now)
    return first, end


def test_doctest() -> None:
    import sys

    result = doctest.testmod(sys.modules["outrider.theory.fleet.simulate"])
    assert result.attempted and not result.failed


@given(
    seed=st.integers(0, 10**6),
    replicas=st.integers(1, 3),
    slots=st.integers(1, 5),
    chunk=st.sampled_from([16, 64, 256]),
    acceptance=st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3),
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    rate=st.sampled_from([0.5, 5.0, 50.0]),
)
@settings(max_examples=40)
def test_jumping_over_steps_is_doing_every_step(seed, replicas, slots, chunk, acceptance, lengths, rate) -> None:
    traffic = poisson(rate, 40, [5, 300, 64, 90], [1, 7, 40, 23], seed)
    replica = Replica(cost, slots, lengths, acceptance, chunk)
    out = simulate(traffic, replica, replicas, seed=seed)
    first, end = by_every_step(traffic, replica, replicas)
    np.testing.assert_allclose(out.first, first, rtol=1e-9)
    np.testing.assert_allclose(out.end, end, rtol=1e-9)


def single(outputs: np.ndarray, gaps: np.ndarray) -> Traffic:
    return Traffic(np.cumsum(gaps), np.ones(len(gaps), np.int64), outputs)


def flat(decoding: int, length: int, rows: int) -> float:
    return 0.01


@pytest.mark.parametrize("servers", [1, 3])
def test_waits_are_lindleys_and_kiefer_wolfowitzs(servers: int) -> None:
    """One sequence at a time and a queue before all servers: the recursions of FIFO queues, request by request."""
    rng = np.random.default_rng(7)
    outputs, gaps = rng.geometric(0.01, 3000), rng.exponential(1.1 / servers, 3000)
    traffic = single(outputs, gaps)
    out = simulate(traffic, Replica(flat, 1), servers, ongoing=1)
    free = [0.0] * servers
    for arrival, size, first, end in zip(traffic.arrival, outputs, out.first, out.end, strict=True):
        begun = max(arrival, heapq.heappop(free))
        heapq.heappush(free, begun + 0.01 * size)
        assert first == pytest.approx(begun + 0.01) and end == pytest.approx(begun + 0.01 * size)
    assert out.busy == pytest.approx(0.01 * outputs.sum())  # no work is lost or made


N, LOAD = 15_000, 0.5


def waits(outputs: np.ndarray, servers: int = 1) -> np.ndarray:
    """Seconds before service of each request at 50% load; a mean service takes a second."""
    gaps = np.random.default_rng(3).exponential(1.0 / (LOAD * servers), len(outputs))
    out = simulate(single(outputs, gaps), Replica(flat, 1), servers, ongoing=1)
    return out.first - out.traffic.arrival - 0.01


def test_one_server_waits_as_pollaczek_and_khinchine_say() -> None:
    sizes = np.random.default_rng(5).geometric(0.01, N)
    markov = LOAD * (2 - 0.01) / 2 / (1 - LOAD)  # E[S^2] of a geometric number of hundredths: nearly M/M/1
    fixed = LOAD / 2 / (1 - LOAD)  # M/D/1: half of it
    random, constant = waits(sizes), waits(np.full(N, 100))
    assert agrees(random, markov) and agrees(constant, fixed)
    assert not agrees(random, fixed) and not agrees(constant, markov)  # the test can tell them apart


def erlang_c(servers: int, offered: float) -> float:
    """Probability of waiting in M/M/c (Erlang, 1917)."""
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    last = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return last / (sum(terms) + last)


def test_several_servers_wait_as_erlang_says() -> None:
    sizes, c = np.random.default_rng(6).geometric(0.01, N), 3
    found = waits(sizes, c)
    expected = erlang_c(c, c * LOAD) / (c - c * LOAD)
    assert agrees(found, expected) and not agrees(found, LOAD / (1 - LOAD) / c)
    assert agrees((found > 1e-9).astype(float), erlang_c(c, c * LOAD))


def test_a_batch_that_costs_nothing_more_is_several_servers() -> None:
    """Four slots at the cost of one are four servers, but for the wait for the end of a step: half of it on average."""
    sizes = np.random.default_rng(8).geometric(0.01, N)
    gaps = np.random.default_rng(9).exponential(1.0 / (4 * LOAD), N)
    out = simulate(single(sizes, gaps), Replica(flat, 4), 1)
    expected = erlang_c(4, 4 * LOAD) / (4 - 4 * LOAD)
    found = out.first - out.traffic.arrival - 0.01
    assert expected - 0.02 < found.mean() < expected + 0.03


def test_little() -> None:
    """Arrivals see lambda times the time in the system (Little 1961; Poisson arrivals see averages, Wolff 1982)."""
    traffic = poisson(15.0, N, [100, 400], [20, 60], seed=2)
    out = simulate(traffic, Replica(cost, 6, (2,), (0.7, 0.6)), 3, seed=4)
    ends = np.sort(out.end)
    seen = np.arange(N) - np.searchsorted(ends, traffic.arrival)
    time = out.end - traffic.arrival
    assert agrees(seen - 15.0 * time, 0.0) and not agrees(seen - 12.0 * time, 0.0)


def test_a_full_batch_emits_at_the_renewal_rate() -> None:
    """All slots always taken: b E / T(b, L) tokens a second (renewal-reward)."""
    acceptance, slots, length = (0.8, 0.6, 0.5), 8, 3
    n = 900
    traffic = Traffic(np.zeros(n), np.ones(n, np.int64), np.full(n, 400))
    out = simulate(traffic, Replica(cost, slots, (length,), acceptance), 1, seed=1)
    expected = 1 + 0.8 + 0.8 * 0.6 + 0.8 * 0.6 * 0.5
    per_step = out.traffic.output.sum() / (out.busy / cost(slots, length, 0)) / slots
    assert per_step == pytest.approx(expected, rel=0.03)  # ends of texts and the last, emptier steps lose 1 to 2%
    assert out.gap(0.5) == pytest.approx(cost(slots, length, 0), rel=0.011)


@given(
    seed=st.integers(0, 10**6),
    replicas=st.integers(1, 4),
    ongoing=st.sampled_from([None, 1, 6]),
    queue=st.sampled_from([None, 0, 3]),
    between=st.sampled_from([None, 0.3, 5.0]),
    retries=st.integers(0, 2),
    jitter=st.sampled_from([(), (0.5, 1.0, 1.5)]),
)
@settings(max_examples=40)
def test_every_request_ends_once(seed, replicas, ongoing, queue, between, retries, jitter) -> None:
    traffic = poisson(40.0, 120, [5, 300, 64], [1, 30, 60], seed)
    replica = Replica(cost, 4, (0, 3, 3, 2, 1), (0.8, 0.5, 0.3), jitter=jitter, overhead=0.002)
    failures = None if between is None else Failures(between, 0.2, retries)
    runs = [
        simulate(traffic, replica, replicas, ongoing=ongoing, queue=queue, failures=failures, seed=seed)
        for _ in range(2)
    ]
    out = runs[0]
    assert set(out.status) <= {OK, FAILED, REFUSED}
    whole = out.whole
    assert np.isfinite(out.first[whole]).all() and np.isnan(out.first[~whole]).all() and np.isnan(out.end[~whole]).all()
    assert (out.ttft() > 0.01 * np.ceil(traffic.prompt[whole] / 256) * min(jitter or (1,))).all()
    assert (out.end[whole] >= out.first[whole]).all()
    assert (np.isnan(out.first) == np.isnan(out.end)).all()
    assert out.tries >= whole.sum() and out.tries <= len(traffic.arrival) * (1 + retries)
    if between is None:
        assert (out.status != FAILED).all()
        if queue is None:
            assert whole.all()
    for name in ("status", "first", "end", "replica"):
        np.testing.assert_array_equal(getattr(out, name), getattr(runs[1], name))
    assert out.busy == runs[1].busy and out.steps == runs[1].steps


def test_more_replicas_and_better_drafts_are_faster_and_failures_cost() -> None:
    traffic = poisson(60.0, 2000, [200, 700], [40, 90], seed=1)

    def run(n: int, acceptance: float = 0.7, **more: object):
        return simulate(traffic, Replica(cost, 8, (2,), (acceptance,) * 2), n, seed=2, **more)  # type: ignore[arg-type]

    fleets = [run(n) for n in (3, 4, 6, 12)]
    means = [o.ttft().mean() for o in fleets]
    assert means == sorted(means, reverse=True) and means[0] > 2 * means[-1]
    speeds = [run(6, a).itl().mean() for a in (0.0, 0.4, 0.7, 0.95)]
    assert speeds == sorted(speeds, reverse=True)
    broken = run(12, failures=Failures(20.0, 2.0))
    again = run(12, failures=Failures(20.0, 2.0, retries=20))
    assert (broken.status == FAILED).any() and again.whole.all()
    assert again.ttft().mean() > fleets[3].ttft().mean()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="rise"):
        Traffic(np.array([1.0, 0.0]), np.array([1, 1]), np.array([1, 1]))
    with pytest.raises(ValueError, match="at least one token"):
        Traffic(np.array([1.0]), np.array([0]), np.array([1]))
    with pytest.raises(ValueError, match="rate of arrivals"):
        poisson(0.0, 3, [1], [1])
    with pytest.raises(ValueError, match="as many acceptances"):
        Replica(cost, 2, (3,), (0.5,))
    with pytest.raises(ValueError, match="positive seconds"):
        simulate(poisson(1.0, 2, [1], [1]), Replica(lambda b, n, r: 0.0, 1), 1)
    with pytest.raises(ValueError, match="between failures"):
        Failures(0.0, 1.0)
