"""The synthetic pairs of the benchmark: what the draft is, what the knobs do, what ends up on disk."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def _load(name: str) -> ModuleType:
    """A benchmark script as a module. Scripts import their neighbours by bare names, so they are loaded first."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


synthetic_files = _load("synthetic_files")
synthetic = _load("synthetic")

SIZE = synthetic.Size(layers=3, hidden=64, heads=4, inner=128, vocab=256)
EFFORT = synthetic.Effort(sequences=16, tokens=24, prompt=8)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def pair():
    return synthetic.Pair(SIZE)


def _ids() -> torch.Tensor:
    return torch.randint(SIZE.vocab, (4, 12), generator=torch.Generator().manual_seed(3))


def test_same_seed_same_weights():
    first, second, other = (synthetic.random_target(SIZE, seed) for seed in (0, 0, 1))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_draft_shares_the_targets_parameters(pair):
    theirs = {p.data_ptr() for p in pair.target.parameters()}
    assert {p.data_ptr() for p in pair.draft.parameters()} < theirs
    assert len(pair.draft.model.layers) == SIZE.draft_layers == 1
    assert len(pair.target.model.layers) == SIZE.layers


@pytest.mark.parametrize("layers", [0, 4])
def test_draft_of_impossible_depth_is_refused(pair, layers):
    with pytest.raises(ValueError, match="cannot be cut"):
        synthetic.truncate_to_draft(pair.target, layers)


def test_without_its_tail_the_target_is_its_draft(pair):
    ids = _ids()
    assert not torch.allclose(pair.target(ids).logits, pair.draft(ids).logits, atol=1e-3)
    pair.set(0.0, 1.0)
    torch.testing.assert_close(pair.target(ids).logits, pair.draft(ids).logits)
    assert pair.compare(ids, 4).acceptance == pytest.approx(1.0, abs=1e-5)


def test_scales_are_not_cumulative(pair):
    before = pair.target(_ids()).logits
    pair.set(0.2, 3.0)
    pair.set(0.5, 2.0)
    pair.set(1.0, 1.0)
    assert torch.equal(pair.target(_ids()).logits, before)


def test_acceptance_falls_as_the_tail_grows(pair):
    ids = pair.sample(EFFORT, 0)
    acceptance = [pair.calibrate(s, ids, EFFORT.prompt).acceptance for s in (0.1, 0.3, 0.6, 1.0)]
    assert acceptance == sorted(acceptance, reverse=True)
    assert acceptance[0] > 0.9 > 0.6 > acceptance[-1]


def test_scored_rows_are_the_distributions_the_tokens_were_drawn_from(pair):
    ids = _ids()
    expected = pair.target(ids).logits[:, 3:-1].flatten(0, 1)
    torch.testing.assert_close(synthetic.scored(pair.target, ids, 4), expected, rtol=1e-4, atol=1e-5)


def test_statistics_against_their_definitions():
    p, q = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.2, 0.6]]), torch.tensor([[0.25, 0.5, 0.25], [0.6, 0.2, 0.2]])
    found = synthetic.statistics(p.clamp_min(1e-30).log(), q.log())
    assert found.acceptance == pytest.approx((0.75 + 0.6) / 2)
    assert found.entropy == pytest.approx((math.log(2) - 0.4 * math.log(0.2) - 0.6 * math.log(0.6)) / 2)
    assert (found.agreement, found.positions) == (0.0, 2)


def test_head_factor_reaches_the_entropy():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    for nats in (0.5, 2.5, 5.0):
        assert synthetic.entropy(synthetic.head_factor(logits, nats) * logits) == pytest.approx(nats, abs=1e-3)
    with pytest.raises(ValueError, match="nats"):
        synthetic.head_factor(logits, 6.0)  # ln 300 = 5.7


def test_samples_follow_the_distribution(pair):
    """Frequencies of the token after one fixed prompt, against the distribution: chi-squared, 1 in 10^4 by chance."""
    pair.set(1.0, 25.0)
    prompt = _ids()[:1]
    distribution = pair.target(prompt).logits[0, -1].softmax(-1)
    ids = synthetic.own_samples(pair.target, prompt.expand(4000, -1), 1, torch.Generator().manual_seed(0))
    counts = torch.bincount(ids[:, -1], minlength=SIZE.vocab)
    common = distribution > 5 / 4000
    observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    expected = 4000 * torch.cat([distribution[common], distribution[~common].sum()[None]]).double()
    freedom = len(observed) - 1
    assert ((observed - expected) ** 2 / expected).sum() < freedom + 3.9 * math.sqrt(2 * freedom) + 8


def test_solve_finds_and_refuses():
    assert synthetic.solve(lambda x: 1 - x * x, 0.19, 0.0, 1.0, 1e-4) == pytest.approx(0.9, abs=1e-3)
    with pytest.raises(ValueError, match="outside"):
        synthetic.solve(lambda x: 1 - x, 2.0, 0.0, 1.0, 0.01)
    with pytest.raises(ValueError, match="steps"):
        synthetic.solve(lambda x: float(x < 0.3), 0.5, 0.0, 1.0, 0.01)


def test_built_pair_on_disk(tmp_path):
    folder = synthetic.build("t", SIZE, 0.8, ("bfloat16", "float32"), tmp_path, EFFORT, tolerance=0.03)
    found = json.loads((folder / "measured.json").read_text())
    assert found["measured"]["acceptance"] == pytest.approx(0.8, abs=0.06)
    assert found["measured"]["entropy"] == pytest.approx(2.5, abs=0.25)
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder / name)
        for name in ("target-bfloat16", "target-float32", "draft-bfloat16", "draft-float32")
    }
    assert {str(m.dtype) for n, m in models.items() if "float32" in n} == {"torch.float32"}
    assert {str(m.dtype) for n, m in models.items() if "bfloat16" in n} == {"torch.bfloat16"}
    exact = dict(models["target-float32"].named_parameters())
    for name, weight in models["target-bfloat16"].named_parameters():
        assert torch.equal(weight.float(), exact[name]), name  # both dtypes have the same distribution
    tokenizer = AutoTokenizer.from_pretrained(folder / "target-bfloat16")
    assert tokenizer.decode(tokenizer.encode("a é\n")) == "a é\n"
    assert models["target-float32"].generation_config.eos_token_id is None


def test_building_is_deterministic_and_resumable(tmp_path):
    first = synthetic.build("t", SIZE, 0.8, ("float32",), tmp_path / "a", EFFORT, tolerance=0.03)
    again = tmp_path / "b" / first.name
    again.mkdir(parents=True)
    turns = json.loads((first / "search.json").read_text())
    (again / "search.json").write_text(json.dumps(turns[:1]))  # as if interrupted after the first turn
    synthetic.build("t", SIZE, 0.8, ("float32",), tmp_path / "b", EFFORT, tolerance=0.03)
    file = "target-float32/model.safetensors"
    assert (first / file).read_bytes() == (again / file).read_bytes()
    stamp = (first / file).stat().st_mtime_ns
    synthetic.build("t", SIZE, 0.8, ("float32",), tmp_path / "a", EFFORT, tolerance=0.03)
    assert (first / file).stat().st_mtime_ns == stamp


def test_another_recipe_in_the_same_place_is_refused(tmp_path):
    synthetic.build("t", SIZE, 0.8, ("float32",), tmp_path, EFFORT, tolerance=0.03)
    other = synthetic.Effort(sequences=4, tokens=24, prompt=8)
    with pytest.raises(ValueError, match="another recipe"):
        synthetic.build("t", SIZE, 0.8, ("float32",), tmp_path, other, tolerance=0.03)
