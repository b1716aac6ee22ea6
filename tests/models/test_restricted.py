"""A draft model with a part of its vocabulary: its numbers are the model's, the ranking and the predictions are what they say, and
what does not go together is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from outrider.build import build_engine
from outrider.errors import CapabilityError, ConfigError
from outrider.models import token_use, vocabulary_choice
from outrider.models.lean import LeanTarget
from outrider.models.load import load_target
from outrider.models.restricted import Restricted
from outrider.models.toy import TableTarget, TinyLM
from outrider.models.vocabulary_choice import Costs, Earned, Prediction, TokenTimes, choose, curve, sizes_of
from outrider.options import EngineOptions
from outrider.params import SamplingParams
from outrider.protocols import Target
from outrider.types import Draft, Rows
from tests.checkpoints import make_checkpoint

KEPT = torch.tensor([7, 2, 30, 11])


def logits(model: Target, tokens: list[int], nodes: int = 0) -> torch.Tensor:
    """After the last token and after a chain of nodes."""
    tree = Draft.join([(tokens[-nodes:] if nodes else (), list(range(-1, nodes - 1)))])
    rows = Rows.assemble([0], [tokens[: len(tokens) - nodes]], [0], tree)
    return model.forward(rows, model.new_kv(1, 64)).logits


def check(model: Target, tolerance: float) -> None:
    """Kept tokens have the model's logits, others none; rows have the same bits alone and among others where the model's have."""
    cut, text = Restricted(model, KEPT), [3, 9, 30, 4, 8]
    whole, found = logits(model, text, 2), logits(cut, text, 2)
    assert found.shape == whole.shape
    assert torch.isfinite(found).sum(1).tolist() == [len(KEPT)] * 3
    torch.testing.assert_close(found[:, KEPT], whole[:, KEPT], rtol=tolerance, atol=tolerance)
    if getattr(model, "uniform_rows", 0):
        assert torch.equal(found[:1], logits(cut, text[:3]))


def test_the_numbers_are_the_models_own() -> None:
    check(TinyLM(40, 16, 2, seed=1), 1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])  # plain; bounded logits, tied; scaled logits
@pytest.mark.parametrize("native", ["1", "0"])
def test_the_cut_head_of_the_lean_runtime(family: str, native: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OUTRIDER_NATIVE", native)
    make_checkpoint(tmp_path, family)
    model = load_target(tmp_path, dtype="float32")
    assert isinstance(model, LeanTarget)
    check(model, 2e-4)


def test_a_forward_that_is_split_is_put_together(tmp_path: Path) -> None:
    """A long prompt beside a short one: the lean runtime scores them apart."""
    make_checkpoint(tmp_path, "llama", max_position_embeddings=512)
    model = load_target(tmp_path, dtype="float32")
    rows = Rows.assemble([0, 1], [[5] * 300, [7, 9]], [0, 0], Draft.empty(2))
    whole, found = (m.forward(rows, m.new_kv(2, 320)).logits for m in (model, Restricted(model, KEPT)))
    torch.testing.assert_close(found[:, KEPT], whole[:, KEPT], rtol=2e-4, atol=2e-4)


def test_hidden_states_that_are_asked_for_come_as_ever() -> None:
    model = TinyLM(40, 16, 2, seed=1)
    cut, rows = Restricted(model, KEPT), Rows.assemble([0], [[1, 2, 3]], [0], Draft.empty(1))
    ours, theirs = (m.forward(rows, m.new_kv(1, 8), layers=(0, 1)).hidden for m in (cut, model))
    assert len(ours) == 2 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_cannot_be_cut_is_refused() -> None:
    model = TinyLM(40, 16, 2, seed=1)
    with pytest.raises(CapabilityError, match="restricted vocabulary already"):
        Restricted(Restricted(model, KEPT), KEPT[:2])
    for bad in ([], [1, 1], [40], [-1]):
        with pytest.raises(ConfigError, match="different ones of the 40"):
            Restricted(model, torch.tensor(bad, dtype=torch.int64))


def test_the_ranking_is_by_the_targets_own_probabilities() -> None:
    """A target with one distribution for every position: tokens come in its order, and half of the texts are kept apart."""
    noise = torch.Generator().manual_seed(3)
    target = TableTarget(torch.randn(1, 1, 50, generator=noise, dtype=torch.float64).expand(1, 50, 50).clone())
    use = token_use.count(target, token_use.prompts_from([], 50), tokens=4)
    assert use.order.tolist() == target.distribution([0]).argsort(descending=True).tolist()
    assert use.unseen.shape == (token_use.SEQUENCES // 2, token_use.PROMPT + 4)


def test_it_is_counted_once_and_again_where_the_cache_is_damaged(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(token_use, "TOKENS", 2)
    target, said = TableTarget.random(40, seed=1), list[str]()
    prompts = token_use.prompts_from([], 40)[:4]
    count = lambda key, t=target: token_use.use_of(t, key, prompts, said.append)  # noqa: E731
    monkeypatch.setattr(token_use, "count", lambda t, p, made=token_use.count: made(t, p, 2))
    first, second = count("a"), count("a")
    assert len(said) == 1 and torch.equal(first.order, second.order) and torch.equal(first.unseen, second.unseen)
    count("b")
    assert len(said) == 2
    for file in token_use.folder().iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    assert torch.equal(count("a").order, first.order)
    assert len(said) == 3


def test_a_cache_that_cannot_be_written_or_is_too_long_costs_time_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target, said, prompts = TableTarget.random(40, seed=1), list[str](), token_use.prompts_from([], 40)[:2]
    monkeypatch.setattr(token_use, "count", lambda t, p, made=token_use.count: made(t, p, 2))
    use = lambda: token_use.use_of(target, "a", prompts, said.append)  # noqa: E731
    first = use()
    (file,) = token_use.folder().iterdir()
    with file.open("r+b") as stream:
        stream.truncate(1 << 20)
    with monkeypatch.context() as without:
        without.setattr(Path, "read_bytes", lambda p: pytest.fail(f"{p} was read"))
        assert torch.equal(use().order, first.order)
    assert len(said) == 2 and file.stat().st_size < 1 << 20
    file.unlink()
    file.mkdir()  # in a folder that can be written to: nothing can be renamed to its name
    assert torch.equal(use().order, first.order)
    assert "cannot be written" in said[-1]


def test_predicted_acceptance_is_that_of_the_kept_tokens() -> None:
    """On a table of one token of memory it is computed beside it, from distributions at every position of the unseen text."""
    target = TableTarget.random(30, seed=1, sharp=2.0)
    draft = target.perturbed(0.5, seed=2)
    use = token_use.count(target, token_use.prompts_from([], 30)[:6], tokens=12)
    found = curve(target, draft, use, [5, 30], 3)
    want, kept = torch.zeros(2, 2), use.order[:5]
    places = [(s, i) for s in range(len(use.unseen)) for i in range(token_use.PROMPT, use.unseen.shape[1])]
    for s, i in places:
        p, q = (m.distribution(use.unseen[s, :i].tolist()) for m in (target, draft))
        cut = torch.zeros_like(q).index_copy(0, kept, q[kept] / q[kept].sum())
        for row, r in enumerate((cut, q)):
            want[row] += torch.tensor([torch.minimum(p, r).sum(), float(p.argmax() == r.argmax())]) / len(places)
    assert torch.tensor([(e.acceptance, e.agreement) for e in found]) == pytest.approx(want, abs=1e-6)
    assert found[0].acceptance < found[1].acceptance and found[0].sampled < found[1].sampled


def test_gain_is_tokens_over_time() -> None:
    earned = Earned(0.8, 0.9, 2.4, 2.7)
    full, half = Costs(100, earned, 0.2), Costs(10, earned, 0.1)
    assert Prediction(full, full, 1.0, 3).gains == pytest.approx((1.0, 1.0))
    assert Prediction(full, half, 1.0, 3).gains == pytest.approx((1.6 / 1.3, 1.6 / 1.3))
    lossy = Prediction(full, Costs(10, Earned(0.0, 0.9, 1.0, 2.7), 0.1), 1.0, 1)
    assert lossy.gains == pytest.approx((1.2 / 2.4 / 1.1, 1.2 / 1.1))
    assert "10 of 100 tokens: predicted acceptance 0.000 instead of 0.800" in lossy.sentence("x")


@pytest.mark.parametrize(("full", "part", "taken"), [(1.0, 0.1, True), (0.1001, 0.1, False)])
def test_auto_takes_a_part_only_where_it_pays(full: float, part: float, taken: bool, monkeypatch) -> None:
    target = TableTarget.random(30, seed=1, sharp=2.0)
    draft = target.perturbed(0.5, seed=2)
    monkeypatch.setattr(vocabulary_choice, "token_times", lambda *_: TokenTimes(full, part, 2.0, 1.0))
    use = token_use.count(target, token_use.prompts_from([], 30)[:6], tokens=12)
    made, told = choose(target, draft, use, None, 3, "the draft")
    assert (made is not None) is taken
    assert (min(told.gains) >= vocabulary_choice.PAYS) is taken or taken  # its own time is measured once more
    asked, _ = choose(target, draft, use, 15, 3, "the draft")
    assert asked is not None and asked.kept.tolist() == use.order[:15].tolist()


def test_sizes_are_below_the_vocabulary() -> None:
    assert sizes_of(4096) == [1024, 2048] and sizes_of(100) == [50]
    assert max(sizes_of(131072)) == 65536


def test_the_option_takes_numbers_and_auto() -> None:
    assert EngineOptions(draft_vocabulary="16_384").draft_vocabulary == 16384
    assert EngineOptions(draft_vocabulary="auto").draft_vocabulary == "auto"
    for bad in (0, -1, "many", "_", "1__2", "1_", True, 1.5):
        with pytest.raises(ConfigError, match="draft_vocabulary must be 'auto' or the number"):
            EngineOptions(draft_vocabulary=bad)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_checkpoint(tmp_path / "target", "llama", tokenizer=True)
    make_checkpoint(tmp_path / "draft", "llama", seed=0, num_hidden_layers=2)
    return tmp_path


def test_an_engine_with_a_part_writes_the_targets_text(folder: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompts = [[5, 9, 2], [40]]
    texts = []
    for vocabulary in (None, 20):
        engine = build_engine(
            folder / "target", str(folder / "draft"), slots=2, max_length=64, draft_vocabulary=vocabulary
        )
        texts.append([r.outputs[0].token_ids for r in engine.generate(prompts, params)])
        assert engine.counts.proposed > 0
        assert any("drafts with 20 of 101 tokens" in n for n in engine.notices) is (vocabulary is not None)
    assert texts[0] == texts[1]


def test_combinations_are_refused_by_name(folder: Path) -> None:
    target, draft = folder / "target", str(folder / "draft")
    with pytest.raises(ConfigError, match="'ngram' has none"):
        build_engine(target, "ngram", draft_vocabulary=20)
    with pytest.raises(ConfigError, match="draft_vocabulary does not go with 'translate:"):
        build_engine(target, f"translate:{draft}", draft_vocabulary=20)
    with pytest.raises(ConfigError, match="needs a target from a folder"):
        build_engine(TinyLM(101, 16, 1, seed=1), draft, draft_vocabulary=20)
    engine = build_engine(target, "ngram", draft_vocabulary="auto", max_length=64)
    assert any("it does nothing" in n for n in engine.notices)
