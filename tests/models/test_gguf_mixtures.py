"""Mixtures of experts in GGUF files: numbers of transformers on the files' values, the same bits and texts in any company."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from outrider.build import build_engine, companion
from outrider.errors import ConfigError
from outrider.evaluate.planning import pace as measured
from outrider.models.convert import convert
from outrider.models.gguf.checkpoint import OLDER, GgufCheckpoint
from outrider.models.gguf.weights import Weights
from outrider.models.lean import LeanTarget
from outrider.models.load import inspect_checkpoint, load_target
from outrider.models.native.build import load_library
from outrider.params import SamplingParams
from outrider.theory.experts import Routing
from outrider.types import Draft, Rows
from tests.checkpoints import make_checkpoint
from tests.mixture_files import rounded, small, write

pytest.importorskip("gguf")
compiled = pytest.mark.skipif(load_library() is None, reason="products in blocks need a C++ compiler")
CASES: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "qwen3moe": ("qwen3_moe", {"": "Q8_0"}, {}),
    "qwen3moe as Q4_K_M": (
        "qwen3_moe",
        {"down_exps": "Q6_K", "attn_v": "Q6_K", "token_embd": "Q4_K", "output": "Q6_K", "up_exps": "Q5_K", "": "Q4_K"},
        {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 1,
         "head_dim": 64},
    ),
    "qwen2moe": ("qwen2_moe", {"": "Q8_0"}, {}),
    "qwen2moe in other types": (
        "qwen2_moe", {"shexp": "Q5_1", "exps": "Q4_0", "": "Q8_0"}, {"num_experts": 5, "shared_expert_intermediate_size": 96},
    ),
    "mixtral": ("mixtral", {"blk.1": "Q4_1", "down_exps": "Q5_0", "": "Q8_0"}, {"sliding_window": 9}),
    "olmoe": ("olmoe", {"exps": "Q5_1", "": "Q8_0"}, {}),
    "gpt-oss": ("gpt_oss", {"exps": "MXFP4", "": "Q8_0"}, {"swiglu_limit": 7.0}),
    "gpt-oss without grouped heads": (
        "gpt_oss", {"exps": "MXFP4", "attn": "F16", "": "Q8_0"}, {"swiglu_limit": 7.0, "num_key_value_heads": 4},
    ),
}  # fmt: skip
TEXT = torch.randint(101, (40,), generator=torch.Generator().manual_seed(3)).tolist()


def logits(target: Any, text: list[int]) -> Tensor:
    """Of every row of a text."""
    rows = replace(Rows.assemble([0], [text], [0], Draft.empty(1)), scored=torch.arange(len(text)))
    return target.forward(rows, target.new_kv(1, len(text))).logits


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A file, and the logits of transformers on its values."""
    family, kinds, overrides = CASES[request.param]
    model = small(family, **overrides)
    file = write(model, tmp_path_factory.mktemp(family) / "x.gguf", kinds)
    with torch.no_grad():
        return file, rounded(model, kinds)(torch.tensor([TEXT])).logits[0]


def test_its_values_give_the_logits_of_transformers(made: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 products of what the blocks stand for."""
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")
    found = logits(load_target(made[0], dtype="float32"), TEXT)
    assert made[1].std() > 0.5
    assert torch.allclose(found, made[1], atol=2e-4 * float(made[1].std()))


@compiled
def test_products_in_blocks_are_near(made: tuple[Path, Tensor]) -> None:
    """Only the rounding of inputs is between them; where it chooses another expert a row moves further, so the median is asked."""
    found = logits(load_target(made[0], dtype="float32"), TEXT)
    p, q = made[1].double().log_softmax(-1), found.double().log_softmax(-1)
    kl, tv = (p.exp() * (p - q)).sum(-1), (p.exp() - q.exp()).abs().sum(-1) / 2
    assert 0 < float(kl.median()) < 2e-3 and float(tv.median()) < 0.02
    assert float(kl.mean()) < 0.05


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@compiled
def test_a_row_has_the_same_bits_in_any_company(made: tuple[Path, Tensor], threads: None) -> None:
    """A text at once on two threads, in chunks beside another text, and token by token on one: experts' weights are unpacked for
    all rows that chose them, for some and for one."""
    target = load_target(made[0], dtype="float32")
    torch.set_num_threads(2)
    whole = logits(target, TEXT)
    kv, alone = target.new_kv(2, 48), target.new_kv(1, 48)
    for at in range(0, 40, 8):
        rows = Rows.assemble([0, 1], [TEXT[at : at + 8], TEXT[at % 7 : at % 7 + 8]], [at, at], Draft.empty(2))
        rows = replace(rows, scored=torch.arange(8))
        assert torch.equal(target.forward(rows, kv).logits, whole[at : at + 8])
        kv.commit(rows, [(), ()])
    torch.set_num_threads(1)
    for at, token in enumerate(TEXT):
        one = Rows.assemble([0], [[token]], [at], Draft.empty(1))
        assert torch.equal(target.forward(one, alone).logits[0], whole[at])
        alone.commit(one, [()])


def test_greedy_text_with_drafts_is_that_without(made: tuple[Path, Tensor]) -> None:
    asked = SamplingParams(max_tokens=20, temperature=0.0)
    prompts = [TEXT[:5], TEXT[7:20], [3]]
    engine = build_engine(made[0], draft=str(made[0]), slots=3, max_length=64, dtype="float32", length=3)
    drafted = [r.outputs[0].token_ids for r in engine.generate(prompts, asked)]
    for other in (companion(engine, "none"), companion(engine, "ngram"), companion(engine, length=1)):
        assert [r.outputs[0].token_ids for r in other.generate(prompts, asked)] == drafted
    assert engine.counts.accepted > 0


@compiled
@pytest.mark.parametrize("kind", ["q8_0", "q4_k"])
def test_a_file_and_rounding_at_load_give_the_same_bits(kind: str, tmp_path: Path) -> None:
    """Of a bfloat16 checkpoint; its router is float32 in both."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 288, "num_hidden_layers": 1, "norm_topk_prob": True}
    source = make_checkpoint(tmp_path / "source", "qwen3_moe", dtype=torch.bfloat16, **sizes)
    convert(source, tmp_path / "x.gguf", kind)
    held = Weights(tmp_path / "x.gguf").tensors
    assert (
        held["blk.0.ffn_gate_inp.weight"].block.name == "f32" and held["blk.0.ffn_gate_exps.weight"].block.name == kind
    )
    stored, rounded = (
        load_target(tmp_path / "x.gguf", dtype="bfloat16"),
        load_target(source, dtype="bfloat16", quantize=kind),
    )
    assert torch.equal(logits(stored, TEXT), logits(rounded, TEXT))


@compiled
def test_what_is_told_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is the file's; of experts so much is read as rows touch, in the theory and in the measurement."""
    file = write(small("qwen3_moe", num_hidden_layers=4), tmp_path / "x.gguf", {"": "Q8_0"})
    held = Weights(file).tensors
    facts, all_bytes = inspect_checkpoint(file, dtype="float32"), sum(t.bytes for t in held.values())
    assert facts.weights_bytes == all_bytes and facts.experts.startswith("3 of 8 a row")
    monkeypatch.setattr(measured, "SECONDS", 0.0)
    monkeypatch.setattr(measured, "PART", 1)
    found = measured.pace(file, None, "float32")
    assert not isinstance(found, str) and found.touched[1] == 3
    assert 3 < found.touched[2] < found.touched[8] <= 8 and found.tokens > 0
    target = load_target(file, dtype="float32")
    assert isinstance(target, LeanTarget) and target.row_work is not None and target.native is not None
    experts = sum(t.bytes for name, t in held.items() if "_exps" in name) * 3 / 8
    rest = sum(t.bytes for name, t in held.items() if not any(w in name for w in ("_exps", "norm", "token_embd")))
    expected = 1 + experts / (experts + rest) * (Routing.uniform(8, 3).touched(4) / 3 - 1)
    assert target.row_work(4) == pytest.approx(expected, rel=1e-6)


QWEN: dict[str, tuple[dict[str, Any], str]] = {
    "more used than there are": (
        {"expert_used_count": 9},
        r"expert_used_count \(9\) exceeds qwen3moe.expert_count \(8\)",
    ),
    "none": ({"expert_count": 0}, "expert_count must be a whole number from 1"),
    "none used": ({"expert_used_count": 0}, "expert_used_count must be a whole number from 1"),
    "no count": ({"expert_count": None}, "expert_count must be a whole number from 1"),
    "absurdly many": ({"expert_count": 1 << 30}, "expert_count must be a whole number from 0 to 1024"),
    "fewer than the tensors have": ({"expert_count": 7}, "ffn_gate_inp.weight .* shape"),
    "other units": ({"expert_feed_forward_length": 32}, "ffn_gate_exps.weight .* shape"),
    "absurd units": ({"expert_feed_forward_length": 1 << 31}, "expert_feed_forward_length must be a whole number"),
    "a count that is a text": ({"expert_count": "8"}, "expert_count must be a whole number"),
    "sigmoid": ({"expert_gating_func": 2}, "expert_gating_func 2, a mixture that is not read"),
    "scaled": ({"expert_weights_scale": 2.5}, "expert_weights_scale 2.5"),
    "not divided": ({"expert_weights_norm": False}, "expert_weights_norm False"),
    "shared": ({"expert_shared_count": 1}, "expert_shared_count 1"),
    "shared by its units": ({"expert_shared_feed_forward_length": 64}, "expert_shared_feed_forward_length 64"),
    "groups": ({"expert_group_count": 4}, "expert_group_count 4"),
    "a key nobody knows": ({"expert_bias": 1}, "expert_bias, which is not known"),
}


@pytest.mark.parametrize("name", QWEN)
def test_what_is_wrong_is_refused_by_name(name: str, tmp_path: Path) -> None:
    changes, words = QWEN[name]
    file = write(small("qwen3_moe"), tmp_path / "x.gguf", {"": "Q8_0"}, **changes)
    with pytest.raises(ConfigError, match=words) as refused:
        GgufCheckpoint(file)
    assert "\n" not in str(refused.value)


def test_what_has_no_key_is_not_written(tmp_path: Path) -> None:
    cases = {
        "qwen3_moe": ({"norm_topk_prob": False}, "not divided by their sum"),
        "olmoe": ({"norm_topk_prob": True}, "that are divided by their sum"),
        "gpt_oss": ({"swiglu_limit": 1.5}, "bounds of their own"),
    }
    for family, (changes, words) in cases.items():
        folder = make_checkpoint(tmp_path / family, family, **changes)
        with pytest.raises(ConfigError, match=words):
            convert(folder, tmp_path / "x.gguf", "q8_0")
    folder = make_checkpoint(tmp_path / "dense", "qwen3_moe", norm_topk_prob=True, mlp_only_layers=[1])
    with pytest.raises(ConfigError, match="layers without experts"):
        convert(folder, tmp_path / "x.gguf", "q8_0")
    assert not list(tmp_path.glob("*.gguf"))


def test_a_dense_architecture_with_experts_is_refused(tmp_path: Path) -> None:
    data = write(small("qwen3_moe"), tmp_path / "x.gguf", {"": "Q8_0"}).read_bytes()
    (tmp_path / "x.gguf").write_bytes(data.replace(b"qwen3moe", b"grovemoe"))
    with pytest.raises(ConfigError, match="architecture 'grovemoe', which is not read"):
        GgufCheckpoint(tmp_path / "x.gguf")


def test_experts_that_lie_otherwise_are_named(tmp_path: Path) -> None:
    """Every expert by itself, and gates and ups in one tensor: the file is whole, and says so by a name."""
    for name in OLDER:
        file = write(
            small("qwen3_moe"), tmp_path / "x.gguf", {"": "Q8_0"}, renamed={"blk.0.ffn_gate_exps.weight": name}
        )
        with pytest.raises(ConfigError, match=f"another way than is read here \\({name}\\)"):
            GgufCheckpoint(file)
