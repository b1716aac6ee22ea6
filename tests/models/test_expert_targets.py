"""Mixtures of experts as targets: the text of plain decoding with every rule, of transformers, in every layout of the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.model.early_exit import early_exit
from outrider.drafters.none import NoDraft
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import levels
from outrider.errors import ConfigError
from outrider.models.checkpoint import load_checkpoint
from outrider.models.config import Unsupported
from outrider.models.lean import LeanTarget
from outrider.models.load import load_target
from outrider.params import SamplingParams
from outrider.protocols import Drafter
from outrider.types import Draft, Rows
from outrider.verify import LOSSLESS, load_rule
from tests.checkpoints import edit_config, make_checkpoint
from tests.contract.asked import engine, tokens

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
PROMPTS = [[5, 17, 3, 40], [9], [61, 2, 33, 71, 12, 50, 8]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {family: make_checkpoint(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def pair(folders) -> tuple[LeanTarget, LeanTarget]:
    """A target with experts, and a draft of the same family whose first block is near to it."""
    target = LeanTarget(*load_checkpoint(folders["qwen3_moe"], torch.float32))
    return target, target.first_layers(2)


def drafters(pair: tuple[LeanTarget, LeanTarget]) -> dict[str, Drafter]:
    target, draft = pair
    return {
        "model": ModelDrafter(draft, 4),
        "tree": ModelDrafter(draft, 3, branching=(2, 2, 1)),
        "early": early_exit(target, 1, Levels(levels((1,) * 3), target.vocab_size)),
    }


@pytest.mark.parametrize("capacity", [1, 3])
@pytest.mark.parametrize("name", ["model", "tree", "early"])
@pytest.mark.parametrize("rule", sorted(LOSSLESS))
def test_drafts_change_no_token(pair, name: str, rule: str, capacity: int) -> None:
    """At temperature 0 with every lossless rule, at temperature 1 with `match`; a batch of three and one at a time."""
    judge, proposes = load_rule(rule), drafters(pair)[name]
    if proposes.trees and not judge.trees:
        pytest.skip("this rule judges chains; another test has the refusal")
    how = [SamplingParams(max_tokens=12, temperature=1.0 if rule == "match" else 0.0, seed=i) for i in range(3)]
    plain = tokens(engine(pair[0], NoDraft(), judge, 1).generate(PROMPTS, how))
    assert tokens(engine(pair[0], proposes, judge, capacity).generate(PROMPTS, how)) == plain


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_transformers(folders, family: str) -> None:
    """Float32; text until two logits of transformers are nearer than its rounding and ours together."""
    target = LeanTarget(*load_checkpoint(folders[family], torch.float32))
    model = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
    greedy = [SamplingParams(max_tokens=20, temperature=0.0)]
    (ours,) = tokens(
        engine(target, ModelDrafter(target.first_layers(1), 3), load_rule("block"), 1).generate(PROMPTS[:1], greedy)
    )
    path = list(PROMPTS[0])
    for token in ours:
        with torch.no_grad():
            top = model(torch.tensor([path])).logits[0, -1].topk(2)
        if top.values[0] - top.values[1] < 4e-4:
            break
        assert token == int(top.indices[0])
        path.append(token)
    assert len(path) > len(PROMPTS[0]) + 10


def test_all_experts_in_one_tensor_are_read_alike(folders, tmp_path) -> None:
    """The layout that transformers 5 has in memory, and may write."""
    folder = folders["qwen3_moe"]
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        at = f"model.layers.{layer}.mlp.experts."
        parts = [[tensors.pop(f"{at}{i}.{p}_proj.weight") for i in range(8)] for p in ("gate", "up", "down")]
        gate, up, down = map(torch.stack, parts)
        tensors |= {f"{at}gate_up_proj": torch.cat([gate, up], 1), f"{at}down_proj": down}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    ours, same = (load_checkpoint(path, torch.float32)[1] for path in (folder, tmp_path))
    for a, b in zip(ours.layers, same.layers, strict=True):
        assert torch.equal(a.gate_up, b.gate_up) and torch.equal(a.down, b.down) and torch.equal(a.router, b.router)


def forward(target: LeanTarget, rows: list[int]) -> torch.Tensor:
    packed = Rows.assemble([0], [rows], [0], Draft.empty(1))
    return target.forward(packed, target.new_kv(1, 32)).logits[0]


def test_weights_in_blocks(tmp_path) -> None:
    """Experts rounded to q8_0: within the rounding of the plain ones, and the same bits for any rows beside."""
    folder = make_checkpoint(
        tmp_path, "qwen3_moe", hidden_size=64, moe_intermediate_size=64, num_experts_per_tok=8, vocab_size=101
    )
    plain, blocks = load_target(folder, dtype="float32"), load_target(folder, dtype="float32", quantize="q8_0")
    if blocks.native is None:
        pytest.skip("no native decoder here")
    a, b = forward(plain, PROMPTS[0]), forward(blocks, PROMPTS[0])
    assert (a - b).abs().max() < 0.05 * a.abs().max()
    kv = blocks.new_kv(2, 32)
    both = Rows.assemble([0, 1], [PROMPTS[0], PROMPTS[2]], [0, 0], Draft.empty(2))
    assert torch.equal(blocks.forward(both, kv).logits[0], b)


def test_touched_experts_are_counted(pair) -> None:
    """Against the router's choices by hand: from the taps before every block, one row and many."""
    target = pair[0]
    if target.native is None:
        pytest.skip("no native decoder here")
    forward(target, [5])
    assert target.native.touched == (3, 3, 3)
    for _ in range(200):
        forward(target, torch.randint(101, (5,)).tolist())
    assert all(3 <= n <= 8 for n in target.native.touched)
    draft = pair[1].row_work
    assert draft is not None and draft is not target.row_work
    assert target.row_work(1) == 1.0 and 1.0 < target.row_work(2) < target.row_work(5) <= 8 / 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_local_experts": 1024, "num_experts_per_tok": 1}, "the files have"),
        ({"num_local_experts": 5000}, "num_local_experts"),
        ({"num_experts_per_tok": 9}, "exceeds the number of experts"),
        ({"num_experts": 4}, "differ"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers"),
        ({"mlp_only_layers": [0, 1, 2]}, "no layer with experts"),
        ({"moe_intermediate_size": 41}, "shape"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size"),
    ],
)
def test_what_is_wrong_is_refused_by_name(folders, tmp_path, changes, words: str) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders["qwen3_moe"] / name).read_bytes())
    edit_config(tmp_path, (), **changes)
    with pytest.raises((ConfigError, Unsupported), match=words):
        load_checkpoint(tmp_path, torch.float32)
