"""Early exit: a prefix computes what the whole target computes up to there, on every kind of target; specs; refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.model.early_exit import early_exit
from outrider.drafters.registry import load_drafter
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import levels
from outrider.errors import CapabilityError, ConfigError
from outrider.models.hf.target import HFTarget
from outrider.models.load import load_target
from outrider.models.toy import TableTarget, TinyLM
from outrider.params import SamplingParams
from outrider.protocols import OpenTarget, Target
from outrider.types import Draft, Rows
from outrider.verify import load_rule
from tests.checkpoints import make_checkpoint
from tests.plain_text import assert_plain_text

KINDS = ("toy", "table", "lean", "native", "hf")


def make(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> OpenTarget:
    if kind == "toy":
        return TinyLM(23, 16, 3, seed=2)
    if kind == "table":
        return TableTarget.random(23, seed=2)
    path = make_checkpoint(folder / "target", "qwen3")
    if kind == "hf":
        return HFTarget.load(path, dtype=torch.float32)
    monkeypatch.setenv("OUTRIDER_NATIVE", "1" if kind == "native" else "0")
    target = load_target(path, dtype="float32", implementation="lean")
    if kind == "native" and target.native is None:  # type: ignore[attr-defined]
        pytest.skip("no native decoder here")
    assert (target.native is not None) == (kind == "native")  # type: ignore[attr-defined]
    return target  # type: ignore[return-value]


def rows(cached: tuple[int, int], prefixes: list[list[int]]) -> Rows:
    """Two sequences, a chain and a tree behind them."""
    draft = Draft(torch.tensor([4, 5, 6, 7, 8]), (-1, 0, -1, -1, 3), (2, 3))
    return Rows.assemble([0, 1], prefixes, list(cached), draft)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_is_the_target_up_to_there(kind: str, tmp_path: Path, monkeypatch) -> None:
    """Logits = norm and head of the whole's hidden state at that depth, over two steps with a partial acceptance between."""
    whole = make(kind, tmp_path, monkeypatch)
    assert isinstance(whole, OpenTarget)
    for depth in range(1, whole.layers + 1):
        part = whole.first_layers(depth)
        assert (part.layers, part.vocab_size, part.hidden_size) == (depth, whole.vocab_size, whole.hidden_size)
        kvs = part.new_kv(2, 32), whole.new_kv(2, 32)
        for step in (rows((0, 0), [[1, 2, 3], [9, 1]]), rows((4, 4), [[2], [3, 1]])):
            found = part.forward(step, kvs[0], layers=(depth,))
            wanted = whole.forward(step, kvs[1], layers=(depth,)).hidden[0]
            torch.testing.assert_close(found.hidden[0], wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.logits, whole.unembed(wanted[step.scored]), rtol=1e-4, atol=1e-4)
            for kv in kvs:
                kv.commit(step, [[0], [1, 2]])
    with pytest.raises(CapabilityError, match=r"1 to"):
        whole.first_layers(whole.layers + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_norm_and_head_are_the_unembedding(kind: str, tmp_path: Path, monkeypatch) -> None:
    whole = make(kind, tmp_path, monkeypatch)
    hidden = torch.randn(5, whole.hidden_size, generator=torch.Generator().manual_seed(0)).to(whole.dtype)
    torch.testing.assert_close(whole.head(whole.norm(hidden)), whole.unembed(hidden), rtol=1e-5, atol=1e-5)


def test_the_whole_target_as_its_own_early_exit_is_never_rejected() -> None:
    target = TinyLM(23, 16, 3, seed=2, sharp=3.0)
    rejected = []
    for depth in (3, 1):
        drafter = early_exit(target, depth, Levels(levels((1,) * 3), 23))
        one = Engine(target, drafter, load_rule("speculative_sampling"), Fixed(3), slots=2, max_length=64)
        one.generate([[1, 2], [5]], [SamplingParams(max_tokens=40, seed=i) for i in range(2)])
        assert one.counts.proposed > 40
        rejected.append(one.counts.rejected)
    assert rejected[0] == 0
    assert rejected[1] > 5


class Closed:
    """A target that gives no more than a target must: the protocol's own members, of TinyLM(23, 16, 3)."""

    def __init__(self) -> None:
        for name in {*Target.__annotations__, *vars(Target)}:
            if not name.startswith("_"):
                setattr(self, name, getattr(TinyLM(23, 16, 3), name))


def test_specs_and_refusals(tmp_path: Path) -> None:
    target = TinyLM(23, 16, 3)
    assert load_drafter("early:2", target=target, length=3).name == "early:2"
    assert load_drafter("dynamic:6:early:1", target=target, length=3).max_nodes == 6
    assert load_drafter("ngram+tree:2x1:early:1", target=target, length=2).trees
    for wrong in ("early", "early:x", "early:2:3"):
        with pytest.raises(ConfigError, match="early:LAYERS"):
            load_drafter(wrong, target=target, length=3)
    with pytest.raises(CapabilityError, match="this model has 1 to 3"):
        load_drafter("early:4", target=target, length=3)
    with pytest.raises(CapabilityError, match="cannot run its first layers alone"):
        early_exit(Closed(), 1, Levels(levels((1,)), 23))  # type: ignore[arg-type]


def test_a_model_off_the_seam_is_refused_in_a_sentence() -> None:
    from transformers import StableLmConfig, StableLmForCausalLM

    config = StableLmConfig(
        vocab_size=41,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    target = HFTarget(StableLmForCausalLM(config))
    if target.path != "seam":
        with pytest.raises(CapabilityError, match="cannot be run in part"):
            target.first_layers(1)


@pytest.mark.parametrize("implementation", ["lean", "hf"])
def test_greedy_text_is_plain_text(implementation: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "target", "llama", tokenizer=True)
    drafts, options = ("early:1", "dynamic:5:early:2"), {"implementation": implementation, "max_length": 64}
    assert_plain_text(path, drafts, prompts=[[3, 1, 4]], tokens=24, length=3, **options)
