"""The distribution against an obvious float64 reference, its twins against each other, and every row against itself alone."""

import math
from random import Random

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings

from outrider.sampling import LogitsPipeline, SamplingParams, cpu, processors
from outrider.types import SequenceView

INF = math.inf


def view(tokens, prompt, params, slot=0):
    return SequenceView(slot=slot, seed=0, tokens=list(tokens), prompt=prompt, cached=0, params=params)


# ---------------------------------------------------------------- the reference: plain loops, float64


def reference_edits(x, params, tokens, prompt, path, eos):
    x = list(x)
    for token, bias in params.bias:
        x[token] += bias
    output = [*tokens[prompt:], *path]
    if len(output) < params.min_tokens:
        banned = {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
        kept = [v if t not in banned else -INF for t, v in enumerate(x)]
        x = kept if max(kept) > -INF else x
    for token in {*tokens, *path}:
        if x[token] == -INF:
            continue
        r = params.repetition_penalty
        x[token] = x[token] / r if x[token] > 0 else x[token] * r
        x[token] -= params.frequency_penalty * output.count(token)
        x[token] -= params.presence_penalty * (output.count(token) > 0)
    return x


def reference_distribution(x, params, tokens, prompt, path, eos):
    """The distribution, and how near the nearest decision about a border was."""
    x = reference_edits(x, params, tokens, prompt, path, eos)
    top = max(x)
    if params.temperature == 0:
        distribution = [0.0] * len(x)
        distribution[x.index(top)] = 1.0
        return distribution, INF
    x = [(v - top) / params.temperature for v in x]
    margin = INF
    if params.min_p > 0:
        margin = min(abs(v - math.log(params.min_p)) for v in x)
        x = [v if v >= math.log(params.min_p) else -INF for v in x]
    if 0 < params.top_k < len(x):
        kth = sorted(x, reverse=True)[params.top_k - 1]
        x = [v if v >= kth else -INF for v in x]
    weights = [math.exp(v) for v in x]
    distribution = [w / math.fsum(weights) for w in weights]
    if params.top_p < 1:
        kept, mass = set(), 0.0
        for token in sorted(range(len(distribution)), key=lambda t: (-distribution[t], t)):
            margin = min(margin, abs(mass - params.top_p))
            if mass >= params.top_p:
                break
            kept.add(token)
            mass += distribution[token]
        distribution = [p / mass if t in kept else 0.0 for t, p in enumerate(distribution)]
    return distribution, margin


VOCAB = 9
EOS = (2,)
grid = st.integers(-64, 64).map(lambda i: i / 8)
odd = st.sampled_from([-INF, 1e30, -1e30, 5e-324, -5e-324, 1e-310, 0.0, 1.0, 1.0])
off_or = lambda off, *on: st.one_of(st.just(off), st.sampled_from(on))  # noqa: E731
params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 1e-6, 100.0]),
    top_k=st.integers(0, VOCAB + 1),
    top_p=off_or(1.0, 1e-9, 0.123, 0.5, 0.77, 0.951, 0.999999),
    min_p=off_or(0.0, 0.013, 0.21, 1.0),
    repetition_penalty=off_or(1.0, 2.0, 0.5),
    presence_penalty=off_or(0.0, 1.5, -0.25),
    frequency_penalty=off_or(0.0, 0.5, -2.0),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.0, 0.125, 100.0]), max_size=3),
    min_tokens=st.integers(0, 4),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3),
)
token_list = lambda low, high: st.lists(st.integers(0, VOCAB - 1), min_size=low, max_size=high)  # noqa: E731
row_strategy = st.tuples(params_strategy, token_list(1, 6), st.integers(0, 6), token_list(0, 4))


def check(distribution, want, margin, near, rtol):
    distribution = np.asarray(distribution)
    assert abs(distribution.sum() - 1) < len(distribution) * np.finfo(distribution.dtype).eps * 4
    assert (distribution >= 0).all()
    if margin > near:
        want = np.asarray(want)
        tiny = np.finfo(distribution.dtype).tiny
        assert ((distribution > 0) | (want < tiny)).all() and ((want > 0) | (distribution < tiny)).all(), "support"
        np.testing.assert_allclose(distribution, want, rtol=rtol, atol=float(tiny) * 1e3)


@settings(max_examples=300)
@given(row_strategy, st.lists(st.one_of(grid, grid, odd), min_size=VOCAB, max_size=VOCAB))
def test_distribution_is_the_reference(row, logits):
    params, tokens, prompt, path = row
    assume(max(logits) > -INF)
    prompt = min(prompt, len(tokens))
    distribution = LogitsPipeline(VOCAB, EOS)(
        torch.tensor([logits], dtype=torch.float64), [view(tokens, prompt, params)], [path]
    )[0]
    assert distribution.dtype == torch.float64
    want, margin = reference_distribution(logits, params, tokens, prompt, path, EOS)
    check(distribution, want, margin, 1e-9, 1e-9)


@settings(max_examples=150)
@given(row_strategy, st.lists(st.one_of(grid, st.just(-INF)), min_size=VOCAB, max_size=VOCAB))
def test_distribution_in_float32_is_the_reference(row, logits):
    params, tokens, prompt, path = row
    assume((max(logits) > -INF and 0.1 < params.temperature < 10) or params.temperature == 0)
    assume(max(logits) > -INF)
    prompt = min(prompt, len(tokens))
    distribution = LogitsPipeline(VOCAB, EOS)(torch.tensor([logits]), [view(tokens, prompt, params)], [path])[0]
    assert distribution.dtype == torch.float32
    want, margin = reference_distribution(logits, params, tokens, prompt, path, EOS)
    check(distribution, want, margin, 1e-5, 1e-5)


@settings(max_examples=150)
@given(st.lists(row_strategy, min_size=1, max_size=6), st.integers(0, 2**32))
def test_a_row_has_the_same_bits_in_any_batch(rows, seed):
    random = Random(seed)
    logits = torch.tensor([[random.choice([random.gauss(0, 4), 1.0, -INF]) for _ in range(VOCAB)] for _ in rows])
    logits[:, 0] = 0.5
    views = [view(tokens, min(prompt, len(tokens)), p, slot=i) for i, (p, tokens, prompt, _) in enumerate(rows)]
    paths = [path for *_, path in rows]
    together = LogitsPipeline(VOCAB, EOS)(logits, views, paths)
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = LogitsPipeline(VOCAB, EOS)(logits[order], [views[i] for i in order], [paths[i] for i in order])
    for place, i in enumerate(order):
        alone = LogitsPipeline(VOCAB, EOS)(logits[i : i + 1], [views[i]], [paths[i]])[0]
        assert torch.equal(alone, together[i])
        assert torch.equal(alone, shuffled[place])


MIXED = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7),
    SamplingParams(top_k=1),
    SamplingParams(top_k=5),
    SamplingParams(temperature=0.6, top_k=50, top_p=0.95),
    SamplingParams(top_k=1000, min_p=0.001),
    SamplingParams(top_p=0.9),
    SamplingParams(temperature=1.7, top_p=0.999),
    SamplingParams(top_p=0.01),
    SamplingParams(min_p=0.05),
    SamplingParams(temperature=2.0, min_p=1e-9, top_p=0.3),
    SamplingParams(temperature=0, repetition_penalty=1.2, frequency_penalty=0.3),
    SamplingParams(repetition_penalty=0.8, top_p=0.8, logit_bias={3: 5.0, 1: -100.0}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("vocab", [4, 101, 4096, 33_001])
def test_large_rows_have_the_same_bits_in_any_batch(vocab, spread, dtype):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(len(MIXED), vocab, generator=generator, dtype=dtype) * spread
    views = [view([i % vocab for i in range(40)], 20, p, slot=i) for i, p in enumerate(MIXED)]
    paths = [tuple(range(i % 4)) for i in range(len(MIXED))]
    pipeline = LogitsPipeline(vocab, (0,))
    together = pipeline(logits, views, paths)
    assert torch.allclose(together.sum(-1), torch.ones(len(MIXED), dtype=dtype), atol=2e-6)
    for i in range(len(MIXED)):
        assert torch.equal(pipeline(logits[i : i + 1], [views[i]], [paths[i]])[0], together[i]), MIXED[i]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
@pytest.mark.parametrize("vocab", [6, 700, 20_000])
def test_cpu_twin_is_the_plain_path(vocab, spread, ties):
    params = [p for p in MIXED if not p.greedy]
    x = torch.randn(len(params), vocab, generator=torch.Generator().manual_seed(7)) * spread
    x = (x * 4).round() / 4 if ties else x
    x[:, 3] = -INF
    before = x.clone()
    plain, fast = processors.distribution_of(x, params), cpu.distribution_of(x, params)
    assert torch.equal(x, before)
    for i, p in enumerate(params):
        # One token at the border may fall either way when the mass of the others is top_p up to rounding.
        assert (plain[i] > 0).ne(fast[i] > 0).sum() <= (1 if p.top_p < 1 else 0), p
        torch.testing.assert_close(fast[i], plain[i], rtol=1e-3 if p.top_p < 1 else 2e-5, atol=2e-6)
    # By top-p alone both decide on the same float32 numbers: the same bits.
    alone = [i for i, p in enumerate(params) if p.top_p < 1.0 and not (p.top_k or p.min_p)]
    assert torch.equal(plain[alone], fast[alone])


# ---------------------------------------------------------------- ties, ends, history


def distribution_of(logits, params, tokens=(0,), prompt=1, path=(), eos=()):
    logits = torch.as_tensor(logits, dtype=torch.float32)
    return LogitsPipeline(len(logits), eos)(logits[None], [view(tokens, prompt, params)], [path])[0].tolist()


def test_greedy_takes_the_lowest_number_on_ties():
    assert distribution_of([1.0, 3.0, 3.0, -INF], SamplingParams(temperature=0)) == [0, 1, 0, 0]


def test_top_k_keeps_ties_with_the_kth():
    assert distribution_of([1.0, 2.0, 1.0, 0.0], SamplingParams(top_k=2))[3] == 0
    assert sum(p > 0 for p in distribution_of([1.0, 2.0, 1.0, 0.0], SamplingParams(top_k=2))) == 3
    assert distribution_of([1.0, 2.0, 1.0, 0.0], SamplingParams(top_k=1)) == [0, 1, 0, 0]


@pytest.mark.parametrize("extra", [{}, {"top_k": 4}, {"min_p": 0.5}])
def test_top_p_keeps_the_lowest_numbers_of_ties(extra):
    assert distribution_of([0.0, 0.0, 0.0, 0.0], SamplingParams(top_p=0.5, **extra)) == [0.5, 0.5, 0, 0]
    assert distribution_of([-9.0, 0.0, 0.0, 0.0], SamplingParams(top_p=0.4, **extra))[3] == 0
    assert distribution_of([0.0, 5.0, 0.0, 0.0], SamplingParams(top_p=1e-9, **extra)) == [0, 1, 0, 0]


def test_min_p_of_one_keeps_the_maxima():
    assert distribution_of([1.0, 3.0, 3.0, 2.9], SamplingParams(min_p=1.0)) == [0, 0.5, 0.5, 0]


def test_low_temperature_of_large_logits_does_not_overflow():
    assert distribution_of([3e38, -3e38, 0.0], SamplingParams(temperature=1e-6)) == [1, 0, 0]
    assert distribution_of([3e38, -3e38, 0.0], SamplingParams(repetition_penalty=0.01), tokens=(0, 1, 2)) == [1, 0, 0]


def test_min_tokens_forbids_every_end_until_the_path_is_long_enough():
    params = SamplingParams(min_tokens=2, stop_token_ids=(1,))
    zero = [0.0] * 4
    assert distribution_of(zero, params, tokens=(3, 3), prompt=1, eos=(0,)) == [0, 0, 0.5, 0.5]
    assert distribution_of(zero, params, tokens=(3, 3), prompt=1, path=(3,), eos=(0,)) == [0.25] * 4
    ignoring = SamplingParams(min_tokens=2, ignore_eos=True)
    assert distribution_of(zero, ignoring, eos=(0,)) == [0.25] * 4


def test_a_ban_on_every_possible_token_is_not_applied():
    params = SamplingParams(min_tokens=2)
    assert distribution_of([1.0, -INF, -INF], params, eos=(0,)) == [1, 0, 0]


def test_repetition_counts_the_prompt_and_the_others_only_the_output():
    tokens, prompt = (0, 0, 1, 1), 2
    repetition = distribution_of([math.log(2)] * 4, SamplingParams(repetition_penalty=2.0), tokens, prompt, path=(2,))
    weight = [math.sqrt(2)] * 3 + [2]
    assert repetition == pytest.approx([w / sum(weight) for w in weight], rel=1e-6)
    frequency = distribution_of([0.0] * 4, SamplingParams(frequency_penalty=math.log(2)), tokens, prompt, path=(2,))
    weight = [1, 1 / 4, 1 / 2, 1]
    assert frequency == pytest.approx([w / sum(weight) for w in weight], rel=1e-6)


@settings(max_examples=60)
@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40), st.data())
def test_a_path_is_the_same_as_having_emitted_it(tokens, data):
    """Every node of a tree has the distribution that its own path would have as a linear history, whatever was asked before."""
    params = SamplingParams(repetition_penalty=1.7, presence_penalty=0.3, frequency_penalty=0.9, min_tokens=6)
    prompt = data.draw(st.integers(0, len(tokens)))
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(len(tokens)))
    pipeline = LogitsPipeline(VOCAB, EOS)
    growing = tokens[:prompt]
    sequence = SequenceView(0, 0, growing, prompt, 0, params)
    for token in tokens[prompt:]:
        growing.append(token)
        path = data.draw(token_list(0, 4))
        want = LogitsPipeline(VOCAB, EOS)(logits, [view([*growing, *path], prompt, params)], [()])
        assert torch.equal(pipeline(logits, [sequence], [path]), want)


def test_counts_are_not_confused_by_a_slot_that_changes_hands_or_a_list_that_was_cut():
    params = SamplingParams(frequency_penalty=1.0)
    pipeline, logits = LogitsPipeline(VOCAB), torch.zeros(1, VOCAB)
    tokens = [0, 1, 1, 1]
    for edit in (
        lambda: None,
        lambda: tokens.append(2),
        lambda: tokens.__delitem__(slice(2, None)),
        lambda: tokens.extend([5, 5]),
    ):
        edit()
        sequence = SequenceView(0, 0, tokens, 1, 0, params)
        assert torch.equal(
            pipeline(logits, [sequence], [()]), LogitsPipeline(VOCAB)(logits, [view(tokens, 1, params)], [()])
        )
    other = view([3, 4], 0, params)
    assert torch.equal(pipeline(logits, [other], [()]), LogitsPipeline(VOCAB)(logits, [other], [()]))
