"""Block drafters: packed blocks against brute force, nothing from the future, the cache against recomputation, folders, specs."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.build import Engine, build_engine
from outrider.control.fixed import Fixed
from outrider.drafters.dflash.drafter import DFlashDrafter
from outrider.drafters.dflash.format import DFlashConfig
from outrider.drafters.dflash.network import DFlashNetwork, visible
from outrider.drafters.registry import load_drafter
from outrider.drafters.tree.growth import BestFirst, Levels
from outrider.drafters.tree.shapes import levels
from outrider.errors import CapabilityError, ConfigError
from outrider.models.toy import TinyLM
from outrider.params import SamplingParams
from outrider.train.features import hidden_of
from outrider.types import Evidence
from outrider.verify import load_rule
from tests.checkpoints import make_checkpoint
from tests.drafters.drafting import Seen, evidence, view

V, H, BLOCK = 19, 16, 4
TARGET = TinyLM(V, H, 3, seed=1, sharp=3.0)
TAPS = (1, 3)


@cache
def block_model(kv_heads: int = 1, layers: int = 2) -> DFlashNetwork:
    torch.manual_seed(3)
    config = DFlashConfig(H, TAPS, V, 2, kv_heads, 6, 20, BLOCK, mask=V - 1, layers=layers)
    model = DFlashNetwork(config).double().eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.5)
    return model


@cache
def states(text: tuple[int, ...]) -> torch.Tensor:
    return hidden_of(TARGET, torch.tensor([text]), TAPS).double()  # float32 on the way


# ------------------------------------------------------------------------------------------------------ packed blocks
def test_visibility_against_brute_force() -> None:
    """Overlapping anchors, two documents in a row: a context row is seen if it is earlier *by position* and of the same text."""
    g = torch.Generator().manual_seed(0)
    length = 12
    position = torch.randint(1, length, (3, 7), generator=g)  # with repetitions and overlaps
    position[0] = torch.tensor([1, 4, 5, 5, 6, 11, 2])
    document = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [4] * 2 + [7] * 3 + [4] * 7])
    for texts in (None, document):
        found = visible(position, length, texts)
        for r in range(3):
            for n in range(7):
                a = int(position[r, n])
                want = [t < a and (texts is None or int(document[r, t]) == int(document[r, a])) for t in range(length)]
                assert found[r, n].tolist() == want


def alone(model: DFlashNetwork, taps: torch.Tensor, token: int, size: int, first: int) -> torch.Tensor:
    """One block, computed the plain way: softmax over the keys of its context and of its own slots, row by row."""
    c = model.config
    x = model.embed_tokens(torch.tensor([token] + [c.mask] * (size - 1)))
    context = model.hidden_norm(model.fc(taps.flatten(1)))
    places = torch.arange(first, first + len(context) + size)

    def turned(y: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        cos, sin = model.rotation(at)
        half = c.head_dim // 2
        return y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin

    for layer in model.layers:
        attn, normed = layer.self_attn, layer.input_layernorm(x)  # type: ignore[operator, union-attr]
        rows = torch.cat([context, normed])
        q = turned(attn.q_norm(attn.q_proj(normed).view(size, c.heads, -1)), places[-size:])  # type: ignore[operator, union-attr]
        k = turned(attn.k_norm(attn.k_proj(rows).view(len(rows), c.kv_heads, -1)), places)  # type: ignore[operator, union-attr]
        v = attn.v_proj(rows).view(len(rows), c.kv_heads, -1)  # type: ignore[operator, union-attr]
        out = torch.zeros(size, c.heads, c.head_dim, dtype=x.dtype)
        for h in range(c.heads):
            share = h * c.kv_heads // c.heads
            out[:, h] = torch.softmax(q[:, h] @ k[:, share].T / c.head_dim**0.5, -1) @ v[:, share]
        x = x + attn.o_proj(out.flatten(1))  # type: ignore[operator, union-attr]
        x = x + layer.mlp(layer.post_attention_layernorm(x))  # type: ignore[operator]
    return model.lm_head(model.norm(x[1:]))


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("size", [BLOCK, 2])
def test_packed_blocks_are_the_blocks_alone(kv_heads: int, size: int) -> None:
    """Blocks that overlap, in one forward, with two texts in the second row, against each block by itself."""
    model, g = block_model(kv_heads), torch.Generator().manual_seed(1)
    taps = torch.randn(2, 14, 2, H, generator=g, dtype=torch.float64)
    tokens = torch.randint(V, (2, 14), generator=g)
    position = torch.tensor([[1, 4, 5, 6, 10], [2, 5, 8, 9, 10]])
    document = torch.tensor([[0] * 14, [0] * 6 + [1] * 8])
    packed = model.blocks(model.inject(taps), tokens.gather(1, position), position, slots=size, document=document)
    assert packed.shape == (2, 5, size - 1, V)
    for r in range(2):
        for n in range(5):
            a = int(position[r, n])
            first = 6 if r == 1 and a >= 6 else 0  # positions go on, contexts do not
            want = alone(model, taps[r, first:a], int(tokens[r, a]), size, first)
            torch.testing.assert_close(packed[r, n], want, rtol=0, atol=1e-10)


def test_nothing_leaks_from_the_future() -> None:
    """A block changes with the text before its anchor and with the anchor, and with no token behind it."""
    model, length = block_model(), 12
    g = torch.Generator().manual_seed(2)
    text = torch.randint(V, (1, length), generator=g)
    position = torch.arange(1, length - BLOCK + 1)[None]

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        keys = model.inject(states(tuple(tokens[0].tolist())))
        return model.blocks(keys, tokens.gather(1, position), position)[0]

    base = logits(text)
    for t in range(length):
        other = text.clone()
        other[0, t] = (other[0, t] + 1) % V
        changed = (logits(other) != base).flatten(1).any(1).tolist()
        assert changed == [int(a) >= t for a in position[0]], t


# ------------------------------------------------------------------------------------------------------------ serving
GROWTHS = {
    "chain": lambda: Levels(levels((1,) * 3), V),
    "short chain": lambda: Levels(levels((1,) * 2), V),
    "most likely": lambda: Levels(levels((1,) * 3), V, sample="greedy"),
    "best first": lambda: BestFirst(6, 3, V, width=2),
}


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("how", list(GROWTHS))
def test_cached_logits_are_those_of_training(how: str, kv_heads: int) -> None:
    """After any history of partial acceptances, joins and leaves, what is served is what a full recomputation gives.

    The cache holds what the target's holds after every round: a row more or less would move every logit.
    """
    model = block_model(kv_heads)
    seen = Seen(GROWTHS[how]())
    drafter = DFlashDrafter(model, seen)  # type: ignore[arg-type]
    one = Engine(TARGET, drafter, load_rule("speculative_sampling"), Fixed(3), slots=3, max_length=60, chunk=5)
    params = [SamplingParams(temperature=1.0, max_tokens=m, seed=i) for i, m in enumerate((14, 9, 21, 6))]
    one.generate([[3, 1, 4], [1] * 11, [5, 9, 2, 6, 5, 3, 5], [8]], params)
    assert one.counts.rejected > 5
    assert len(seen.logits) > 40
    size = seen.depth + 1
    recomputed: dict[tuple[int, ...], torch.Tensor] = {}
    for (history, path), row in seen.logits.items():
        if history not in recomputed:
            anchor = torch.tensor([[len(history) - 1]])
            keys = model.inject(states(history[:-1]))  # the anchor has no hidden state yet
            recomputed[history] = model.blocks(keys, torch.tensor([[history[-1]]]), anchor, slots=size)[0, 0]
        found = recomputed[history][len(path)]
        torch.testing.assert_close(row, found, rtol=0, atol=2e-4)  # hidden states went through float32 above


def test_the_cache_holds_what_the_target_holds_after_every_round() -> None:
    """As many rows as the target's cache, and its values are those of one injection of the whole text: nothing rejected stays."""
    model = block_model(2)
    drafter, rounds = DFlashDrafter(model, GROWTHS["chain"]()), 0
    one = Engine(TARGET, drafter, load_rule("speculative_sampling"), Fixed(3), slots=2, max_length=60, chunk=5)
    honest = drafter.draft

    def watched(seen: Evidence, budget):
        nonlocal rounds
        out = honest(seen, budget)
        for v in seen.sequences:
            assert drafter.cache.length[v.slot] == drafter.context.next[v.slot] == v.cached
            for n, (k, value) in enumerate(model.inject(states(tuple(v.tokens[: v.cached]))) if v.cached else ()):
                held = drafter.cache.read(n, v.slot, v.cached)
                torch.testing.assert_close(held[0], k[0].transpose(0, 1), rtol=0, atol=2e-4)
                torch.testing.assert_close(held[1], value[0].transpose(0, 1), rtol=0, atol=2e-4)
            rounds += 1
        return out

    drafter.draft = watched  # type: ignore[method-assign]
    params = [SamplingParams(temperature=1.0, max_tokens=m, seed=i) for i, m in enumerate((14, 9, 11))]
    one.generate([[3, 1, 4], [1] * 11, [5, 9, 2, 6, 5, 3, 5]], params)
    assert rounds > 20
    assert one.counts.accepted and one.counts.rejected > 5


def test_a_gap_in_what_was_seen_makes_a_draft_worse_never_wrong() -> None:
    drafter = DFlashDrafter(block_model(), GROWTHS["chain"]())
    with pytest.raises(ConfigError, match="bind"):
        drafter.draft(evidence([view([1, 2, 3])], V), [3])
    drafter.bind(1, 40)
    found = drafter.draft(evidence([view([1, 2, 3])], V), [3])  # no row of this sequence was in the forward
    assert found.counts == (0,)


def test_distributions_are_declared_for_every_slot_or_for_none() -> None:
    """Sampled drafts carry the slots' distributions, one for each node; most likely tokens and trees are point masses."""
    drafts = []
    for how in ("chain", "most likely", "best first"):
        drafter = DFlashDrafter(block_model(), GROWTHS[how]())
        one = Engine(TARGET, drafter, load_rule("speculative_sampling"), Fixed(3), slots=1, max_length=60)
        made, draft = [], drafter.draft
        drafter.draft = lambda e, b, d=draft, m=made: m.append(d(e, b)) or m[-1]  # type: ignore[method-assign]
        one.generate([[1, 2, 3]], SamplingParams(temperature=0.8, max_tokens=12, seed=0))
        drafts.append([d for d in made if sum(d.counts)])
    for d in drafts[0]:
        assert d.q is not None
        assert d.q.row == tuple(range(len(d.token)))
        torch.testing.assert_close(d.q.probs.sum(-1), torch.ones(len(d.token), dtype=d.q.probs.dtype))
    assert drafts[0]
    assert drafts[1]
    assert all(d.q is None for kind in drafts[1:] for d in kind)
    assert any(not d.is_chain for d in drafts[2])


def test_a_draft_longer_than_its_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="trained with 4"):
        DFlashDrafter(block_model(), Levels(levels((1,) * 4), V))


@pytest.mark.parametrize(
    "wrong", [{"block": 1}, {"mask": V}, {"mask": -1}, {"taps": ()}, {"layers": 0}, {"head_dim": 5}]
)
def test_shapes_that_make_no_sense_are_refused(wrong: dict) -> None:
    fine = {
        "hidden": H, "taps": TAPS, "vocab_size": V, "heads": 2, "kv_heads": 1, "head_dim": 6, "inner": 20, "block": 4, "mask": 0,
    }  # fmt: skip
    DFlashConfig(**fine)
    with pytest.raises(ConfigError):
        DFlashConfig(**(fine | wrong))


# ------------------------------------------------------------------------------------------------------------ folders
def test_round_trip(tmp_path: Path) -> None:
    """What is written is read again, rounded to bfloat16 and not otherwise; one more trip changes nothing."""
    model = block_model(2)
    model.save(tmp_path / "a", tables=True)
    read = DFlashNetwork.load(tmp_path / "a", TARGET)
    assert read.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], value.bfloat16().float())
    read.save(tmp_path / "b", tables=True)
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()
    again = load_file(tmp_path / "b" / "model.safetensors")
    for name, value in load_file(tmp_path / "a" / "model.safetensors").items():
        assert torch.equal(again[name], value)


def test_names_and_fields_of_the_layout(tmp_path: Path) -> None:
    """Tensor names and configuration keys are those that other programs look for; the target's tables are not written."""
    block_model(1, 2).save(tmp_path, "some/target")
    assert set(load_file(tmp_path / "model.safetensors")) == {
        "fc.weight", "hidden_norm.weight", "norm.weight",
        *(f"layers.{i}.{n}.weight" for i in range(2) for n in ("input_layernorm", "post_attention_layernorm")),
        *(f"layers.{i}.self_attn.{n}.weight" for i in range(2) for n in ("q_norm", "k_norm")),
        *(f"layers.{i}.self_attn.{n}_proj.weight" for i in range(2) for n in "qkvo"),
        *(f"layers.{i}.mlp.{n}_proj.weight" for i in range(2) for n in ("gate", "up", "down")),
    }  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == "dflash"
    assert (
        config["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
        == BLOCK - 1
        == config["block_size"] - 1
    )
    assert config["speculators_config"]["verifier"]["name_or_path"] == "some/target"
    assert config["aux_hidden_state_layer_ids"] == list(TAPS)
    assert (config["mask_token_id"], config["sample_from_anchor"]) == (V - 1, False)
    assert config["sliding_window_non_causal"] is True, "without it vLLM serves the block causally"
    assert config["transformer_layer_config"]["layer_types"] == ["full_attention"] * 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("implementation", ["auto", "hf"])
def test_tables_are_the_targets(tied: bool, implementation: str, tmp_path: Path) -> None:
    """A folder without tables takes the target's: its embeddings, and its head, with or without its folder."""
    place = make_checkpoint(tmp_path / "target", "llama", tokenizer=True, tie_word_embeddings=tied)
    one = build_engine(place, "none", dtype="float32", implementation=implementation)
    target, wide = one.parts.target, 48
    torch.manual_seed(0)
    model = DFlashNetwork(DFlashConfig(wide, (1, 2), target.vocab_size, 3, 3, 16, 64, 5, mask=0))
    model.save(tmp_path / "dflash")
    raw = load_file(place / "model.safetensors")
    read = DFlashNetwork.load(tmp_path / "dflash", target, str(place))
    torch.testing.assert_close(read.embed_tokens.weight, raw["model.embed_tokens.weight"])
    torch.testing.assert_close(read.lm_head.weight, raw["model.embed_tokens.weight" if tied else "lm_head.weight"])
    torch.testing.assert_close(DFlashNetwork.load(tmp_path / "dflash", target).lm_head.weight, read.lm_head.weight)


@pytest.mark.parametrize("implementation", ["auto", "hf"])
def test_greedy_text_is_the_targets_on_both_targets(implementation: str, tmp_path: Path) -> None:
    """Chains and trees, one sequence and three, with hidden states of either target; the drafter is random, the text is not."""
    place = make_checkpoint(tmp_path / "target", "qwen3", tokenizer=True)
    torch.manual_seed(0)
    DFlashNetwork(DFlashConfig(48, (1, 3), 260, 3, 1, 16, 64, 5, mask=0)).save(tmp_path / "dflash")
    params = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
    texts = []
    for draft in ("none", "dflash", "greedy:dflash", "dynamic:8:dflash"):
        one = build_engine(place, draft, length=4, dtype="float32", implementation=implementation, slots=3)
        texts.append([r.outputs[0].token_ids for r in one.generate(["the line", "a", "of many"], params)])
        assert draft == "none" or one.counts.proposed > 30
    assert all(t == texts[0] for t in texts)


def test_specs(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    block_model().save(tmp_path / "dflash", tables=True)

    def load(spec: str, length: int = 3, path: Path | None = tmp_path / "target"):
        return load_drafter(spec, target=TARGET, length=length, target_path=str(path) if path else None)

    made = load("dflash")
    assert (made.name, made.layers, made.max_depth, made.trees) == ("dflash", TAPS, 3, False)
    assert load("dflash", 9).max_depth == BLOCK - 1, "a longer draft is not to be had"
    assert load(f"dflash:{tmp_path / 'dflash'}", 2, None).max_depth == 2
    assert load("greedy:dflash").growth.sample == "greedy"  # type: ignore[attr-defined]
    tree = load("dynamic:6x3:dflash", 9)
    assert (tree.max_nodes, tree.max_depth, tree.trees) == (6, BLOCK - 1, True)
    assert load("ngram+dflash").max_depth == 3
    with pytest.raises(ConfigError, match="companion folder"):
        load("dflash", path=None)
    with pytest.raises(ConfigError, match="not 'eagle3'"):
        load(f"eagle:{tmp_path / 'dflash'}")


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    block_model().save(tmp_path, tables=True)
    path = tmp_path / "config.json"
    fine = json.loads(path.read_text())
    shape = fine["transformer_layer_config"]
    wrong = [
        ({"sample_from_anchor": True}, ConfigError, "sample_from_anchor"),
        ({"draft_vocab_size": 5}, ConfigError, "reduced draft vocabulary"),
        ({"block_size": 10**9}, ConfigError, "block_size"),
        ({"block_size": 1}, ConfigError, "at least 2 slots"),
        ({"mask_token_id": None}, ConfigError, "mask_token_id"),
        ({"mask_token_id": V}, ConfigError, "mask token"),
        ({"aux_hidden_state_layer_ids": "1,3"}, ConfigError, "aux_hidden_state_layer_ids"),
        ({"aux_hidden_state_layer_ids": [1, 9]}, CapabilityError, "reads layers"),
        ({"transformer_layer_config": shape | {"layer_types": ["sliding_attention"] * 2}}, ConfigError, "sliding"),
        ({"transformer_layer_config": shape | {"attention_bias": True}}, ConfigError, "attention_bias"),
        ({"transformer_layer_config": shape | {"hidden_size": 32}}, CapabilityError, "width 32"),
        ({"transformer_layer_config": shape | {"intermediate_size": 21}}, ConfigError, "tensors"),
        ({"transformer_layer_config": shape | {"rope_parameters": {"rope_type": "yarn"}}}, ConfigError, "yarn"),
    ]
    for change, error, said in wrong:
        path.write_text(json.dumps(fine | change))
        with pytest.raises(error, match=said):
            DFlashNetwork.load(tmp_path, TARGET)
    path.write_text(json.dumps(fine))
    weights = tmp_path / "model.safetensors"
    save_file({n: t for n, t in load_file(weights).items() if n != "fc.weight"}, weights)
    with pytest.raises(ConfigError, match="fc.weight"):
        DFlashNetwork.load(tmp_path, TARGET)
