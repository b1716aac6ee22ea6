"""EAGLE-1, and checkpoints of others: parts of the vocabulary, folders that leave out what is the target's own."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.eagle.drafter import EagleDrafter
from outrider.drafters.eagle.eagle1 import Eagle1Network
from outrider.drafters.eagle.eagle3 import Eagle3Network
from outrider.drafters.eagle.network import EagleConfig, EagleNetwork
from outrider.drafters.medusa.drafter import MedusaDrafter
from outrider.drafters.medusa.format import MedusaConfig
from outrider.drafters.medusa.network import MedusaNetwork
from outrider.drafters.registry import load_drafter
from outrider.drafters.target_tables import target_tables
from outrider.drafters.tree.growth import BestFirst, Levels
from outrider.drafters.tree.shapes import levels
from outrider.drafters.vocabulary import from_offsets, spread, to_offsets
from outrider.errors import CapabilityError, ConfigError
from outrider.models.load import load_target
from outrider.models.toy import TinyLM
from outrider.params import SamplingParams
from outrider.protocols import Target
from outrider.train.distill import Teacher, measure_of
from outrider.train.features import Features, hidden_of
from outrider.train.methods.eagle import feature_loss, new_last_features
from outrider.train.methods.registry import METHODS
from outrider.verify import load_rule
from tests.checkpoints import make_checkpoint
from tests.covering import covering, slow_beyond
from tests.drafters.networks import TARGET, H, V
from tests.drafters.test_drafters_learned import GROWTHS, Seen, decode, states

LAST = (3,)
SUPPORT = torch.tensor([1, 2, 3, 5, 8, 11, 13, 17])
"""A draft vocabulary of 8 of the 19 tokens."""


def last_model(kv_heads: int = 1) -> Eagle1Network:
    model = new_last_features(EagleConfig(H, H, LAST, V, 2, kv_heads, 8, 20), TARGET, seed=2).double()
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
    return model.eval().requires_grad_(False)


def reduced() -> Eagle3Network:
    torch.manual_seed(3)
    config = EagleConfig(16, H, (1, 3), V, 2, 1, 8, 20, draft_vocab=len(SUPPORT))
    model = Eagle3Network(config, SUPPORT).double().eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.5)
    return model


# ------------------------------------------------------------------------------------------------------------ EAGLE-1
SERVED = [*product(["last"], GROWTHS, [1, 2]), *product(["reduced"], GROWTHS, [1])]


@pytest.mark.parametrize(("kind", "how", "kv_heads"), slow_beyond(SERVED, covering(SERVED)))
def test_cached_logits_are_those_of_training(kind: str, how: str, kv_heads: int) -> None:
    """After any history of partial acceptances every logit served equals the unroll of the same tokens."""
    model: EagleNetwork = last_model(kv_heads) if kind == "last" else reduced()
    taps_at = model.config.taps
    seen = Seen(GROWTHS[how]())
    decode(EagleDrafter(model, seen), 3)
    assert len(seen.logits) > 40
    for history, path, rows in seen.along():
        known = len(history) - 1
        taps = states(history, taps_at)[None, :known]
        found = model.unroll(torch.tensor([[*history, *path]]), taps, len(rows))
        for row, level in zip(rows, found, strict=True):
            torch.testing.assert_close(row, level[0, known - 1], rtol=0, atol=2e-4)


def test_the_loss_is_the_written_one() -> None:
    """Smooth L1 of the next feature plus a tenth of the cross-entropy of the distributions; without noise, against plain loops."""
    model, target = last_model(), TARGET
    tokens = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))
    hidden = hidden_of(target, tokens, LAST).double()
    judge = Teacher.of(target, LAST, LAST)
    torch.manual_seed(0)
    noise = (torch.rand(2, 9, H, dtype=torch.float64) - 0.5) * 0.2 * 512 / 9
    torch.manual_seed(0)
    found = feature_loss(judge)(model, (tokens, hidden), 0.0)

    f = model.read(hidden)
    (state,) = model.states(tokens, (f + noise)[:, :-1], 1)
    near, cross = 0.0, 0.0
    for r in range(2):
        for i in range(8):
            gap = (state[r, i] - f[r, i + 1]).abs()
            near += float(torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean())
            p = target.unembed(hidden[r, i + 1])[0].softmax(-1)
            cross -= float((p * (model.lm_head.weight @ state[r, i]).log_softmax(-1)).sum())
    assert found.item() == pytest.approx((near + 0.1 * cross) / 16, rel=1e-5)


def test_training_raises_acceptance() -> None:
    target = TinyLM(V, H, 3, seed=1, sharp=3.0, dtype=torch.float32)
    tokens = torch.randint(V, (16, 24), generator=torch.Generator().manual_seed(0))
    hidden = hidden_of(target, tokens, LAST)
    data = Features(tokens.numpy().astype("uint16"), hidden.half().numpy(), LAST, rows=4)
    model, judge = new_last_features(EagleConfig(H, H, LAST, V, 2, 1, 8, 32), target), Teacher.of(target, LAST, LAST)
    measure = measure_of(judge, METHODS["eagle1"].predictor(3), data)
    before = measure(model)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss = feature_loss(judge)
    for step in range(150):
        adam.zero_grad()
        loss(model, data(step), 0.0).backward()
        adam.step()
    assert measure(model)["accept_1"] > before["accept_1"] + 0.03
    assert all(not t.requires_grad for t in (model.embed_tokens.weight, model.lm_head.weight, model.norm.weight))


def test_a_folder_holds_no_table_of_the_target(tmp_path: Path) -> None:
    """EAGLE's own names; what is the target's is read from the target: the same logits again, rounded to bfloat16."""
    target = load_target(make_checkpoint(tmp_path / "target", "llama"), dtype="float32")
    config = EagleConfig(48, 48, (3,), target.vocab_size, 3, 3, 16, 32)
    model = new_last_features(config, target).eval().requires_grad_(False)
    model.save(tmp_path / "eagle", "some/target")
    names = set(load_file(tmp_path / "eagle" / "model.safetensors"))
    layer = "layers.0."
    assert names == {
        "fc.weight", "fc.bias", f"{layer}post_attention_layernorm.weight",
        *(f"{layer}self_attn.{n}_proj.weight" for n in "qkvo"),
        *(f"{layer}mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
    }  # fmt: skip
    read = Eagle1Network.load(tmp_path / "eagle", target)
    assert read.config == model.config
    for name in ("embed_tokens", "lm_head", "norm"):
        torch.testing.assert_close(getattr(read, name).weight, getattr(model, name).weight)
    x = torch.randn(4, 48)
    torch.testing.assert_close(read.lm_head(read.norm(x)), target.unembed(x), rtol=1e-4, atol=1e-4)
    made = load_drafter("dynamic:6:eagle", target=target, length=3, target_path=str(tmp_path / "target"))
    assert (made.layers, made.max_nodes) == ((3,), 6)


def test_a_folder_of_others_of_the_first_kind(tmp_path: Path) -> None:
    """The family's name as its type, no bias in `fc`, its own copy of the embeddings."""
    last_model().float().save(tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    held = {n: t for n, t in load_file(path).items() if n != "fc.bias"}
    held["embed_tokens.weight"] = torch.full((V, H), 0.25)
    save_file(held, path)
    raw = json.loads(config.read_text())
    del raw["target_layer"], raw["head_dim"], raw["base_model"]
    config.write_text(json.dumps(raw | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "bias": False}))
    read = Eagle1Network.load(tmp_path, TARGET)
    assert not bool(read.fc.bias.any())
    assert float(read.embed_tokens.weight.min()) == 0.25
    assert read.config.taps == (TARGET.layers,)
    assert load_drafter(f"eagle:{tmp_path}", target=TARGET, length=3).layers == (3,)
    config.write_text(json.dumps(raw | {"num_hidden_layers": 2}))
    with pytest.raises(ConfigError, match="one layer"):
        Eagle1Network.load(tmp_path, TARGET)


# ------------------------------------------------------------------------------------------------- part of a vocabulary
def test_maps_of_tokens() -> None:
    logits = torch.randn(2, 3, len(SUPPORT))
    wide = spread(logits, SUPPORT, V)
    assert torch.equal(wide[..., SUPPORT], logits)
    assert int(torch.isneginf(wide).sum()) == 6 * (V - len(SUPPORT))
    assert spread(logits, None, V) is logits
    maps = to_offsets(SUPPORT, V)
    assert maps["t2d"].nonzero()[:, 0].tolist() == SUPPORT.tolist()
    back = from_offsets(maps["d2t"], len(SUPPORT), V, Path("x"))
    assert back is not None and torch.equal(back, SUPPORT)
    assert from_offsets(None, V, V, Path("x")) is None
    for wrong in (None, torch.zeros(3), torch.full((8,), 15), torch.tensor([0, -1, 0, 0, 0, 0, 0, 0])):
        with pytest.raises(ConfigError):
            from_offsets(wrong, len(SUPPORT), V, Path("x"))


@pytest.mark.parametrize("own", [False, True])
def test_eagle_3_of_others(own: bool, tmp_path: Path) -> None:
    """d2t and t2d, another draft vocabulary; and EAGLE's own folder: the layer described at the top, `midlayer`, no embeddings."""
    model = reduced().float()
    model.save(tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    held = load_file(path)
    assert set(held) >= {"d2t", "t2d"} and held["lm_head.weight"].shape[0] == len(SUPPORT)
    if own:
        held = {n.replace("layers.0.", "midlayer."): t for n, t in held.items() if n != "embed_tokens.weight"}
        save_file(held, path)
        raw = json.loads(config.read_text())
        shape = raw["transformer_layer_config"]
        flat = {k: shape[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")}
        flat |= {"vocab_size": V, "draft_vocab_size": len(SUPPORT), "model_type": "llama", "num_hidden_layers": 1}
        flat |= {"architectures": ["LlamaForCausalLMEagle3"], "eagle_aux_hidden_state_layer_ids": [1, 3], "head_dim": 8}
        config.write_text(json.dumps(flat))
    read = Eagle3Network.load(tmp_path, TARGET)
    assert read.support is not None and torch.equal(read.support, SUPPORT)
    if own:
        assert torch.equal(read.embed_tokens.weight, TARGET.embed(torch.arange(V)).float())
    logits = read.logits(torch.randn(3, 16))
    assert torch.isfinite(logits).sum() == 3 * len(SUPPORT)
    drafter = load_drafter(f"eagle:{tmp_path}", target=TARGET, length=3)
    one = Engine(TARGET, drafter, load_rule("speculative_sampling"), Fixed(3), slots=2, max_length=60)
    one.generate([[3, 1, 4]], [SamplingParams(max_tokens=30, seed=1)])
    assert one.counts.proposed > 20


def test_only_known_tokens_are_drafted_and_the_text_keeps_its_distribution() -> None:
    """Greedy text is plain text, and every drafted token is one the drafter knows; sampled distributions declare no other mass."""
    text = {}
    for how in ("none", "chain", "dynamic"):
        growth = {"chain": Levels(levels((1,) * 3), V), "dynamic": BestFirst(6, 3, V, width=2)}.get(how)
        drafter = EagleDrafter(reduced(), growth) if growth else load_drafter("none", target=TARGET, length=0)
        one = Engine(TARGET, drafter, load_rule("speculative_sampling"), Fixed(3), slots=1, max_length=80)
        drafted: set[int] = set()
        for temperature in (0.0, 1.0):
            name = one.submit(
                [3, 1, 4], SamplingParams(temperature=temperature, max_tokens=40, seed=0, ignore_eos=True)
            )
            out = text.setdefault((how, temperature), [])
            while one.busy:
                out += [t for e in one.step() if e.request == name for t in e.tokens]
                drafted |= set(one.state.pending.draft.tokens)
                if one.state.pending.draft.q is not None:
                    other = torch.ones(V, dtype=torch.bool)
                    other[SUPPORT] = False
                    assert float(one.state.pending.draft.q.probs[:, other].sum()) == 0.0
        assert drafted <= set(SUPPORT.tolist())
        assert how == "none" or len(drafted) > 2
    assert text["none", 0.0] == text["chain", 0.0] == text["dynamic", 0.0]


def test_heads_over_a_part_of_the_vocabulary(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = MedusaNetwork(MedusaConfig(H, V, 3, 3, 1, False, draft_vocab=len(SUPPORT)))
    model.support = SUPPORT
    for p in model.parameters():
        p.data.normal_(std=0.5)
    model.save(tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    held = load_file(path)
    assert torch.equal(held["token_map"], SUPPORT)
    save_file({n: t for n, t in held.items() if n != "norm.weight"}, path)  # vLLM's folders hold no norm
    read = MedusaNetwork.load(tmp_path, TARGET)
    logits = read(torch.randn(5, H))
    assert logits.shape == (5, 3, V)
    assert int(torch.isfinite(logits).sum()) == 15 * len(SUPPORT)
    seen = Seen(GROWTHS["chain"]())
    decode(MedusaDrafter(read.double(), seen), 3)
    for (history, path_), row in seen.logits.items():
        last = states(history[:-1], LAST)[-1, 0]
        torch.testing.assert_close(row, read(last)[len(path_)], rtol=0, atol=2e-4)
    save_file({n: t for n, t in held.items() if n != "token_map"}, path)
    with pytest.raises(ConfigError, match="token_map"):
        MedusaNetwork.load(tmp_path, TARGET)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"truncated_vocab_size": V + 1}))
    with pytest.raises(ConfigError, match="truncated_vocab_size"):
        MedusaNetwork.load(tmp_path, TARGET)


class Closed:
    """A target that gives no more than a target must: the protocol's own members, of TARGET."""

    def __init__(self) -> None:
        for name in {*Target.__annotations__, *vars(Target)}:
            if not name.startswith("_"):
                setattr(self, name, getattr(TARGET, name))


def test_what_a_target_does_not_give_is_said() -> None:
    with pytest.raises(CapabilityError, match="does not hold the target's own tables"):
        target_tables(Closed(), Path("x"))  # type: ignore[arg-type]
