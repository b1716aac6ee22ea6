"""MTP heads: what they compute is DeepSeek-V3's equations, in every layout and from the cache; how they are found and refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from outrider.build import Engine, build_engine
from outrider.cli.doctor import examine
from outrider.control.fixed import Fixed
from outrider.drafters.combine import FirstOf
from outrider.drafters.context import Backlog
from outrider.drafters.eagle.drafter import EagleDrafter
from outrider.drafters.eagle.forward import NativeForward, forward_of
from outrider.drafters.mtp.format import carried
from outrider.drafters.mtp.network import MtpConfig, MtpNetwork
from outrider.drafters.registry import load_drafter
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import levels
from outrider.errors import CapabilityError, ConfigError
from outrider.evaluate.planning.vllm_draft import drafter_config
from outrider.models.load import inspect_checkpoint, load_target
from outrider.mtp_names import head_tensors
from outrider.nn.blocks.float8 import scaled_blocks
from outrider.nn.held import library_for
from outrider.params import SamplingParams
from outrider.train.methods.mtp import new_head
from outrider.verify import load_rule
from tests.checkpoints import make_checkpoint
from tests.checkpoints_mtp import FAMILIES, LAYERS, NAMES, VOCAB, make_with_head, to_float8
from tests.drafters.drafting import Seen
from tests.drafters.networks import TARGET, H, V
from tests.drafters.test_drafters_learned import GROWTHS, decode, states
from tests.plain_text import assert_plain_text

PROMPTS = [[7, 3, 11, 5, 2, 9, 4], [12, 8], [5] * 6]


@cache
def head(bias: bool = False) -> MtpNetwork:
    model = new_head(MtpConfig(H, H, (3,), V, 2, 1, 8, 20, bias=bias, qk_norm=bias), TARGET, seed=2).double()
    noise = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=noise, dtype=p.dtype)
    return model.eval().requires_grad_(False)


def by_hand(model: MtpNetwork, text: list[int], g: torch.Tensor) -> torch.Tensor:
    """Logits after `text` by the equations, row by row: g holds the target's states behind its norm at the first positions, and the
    head's own stand for the others."""
    c, layer, rows = model.config, model.layers[0], list(g)
    w = dict(layer.state_dict())
    heads = range(c.heads)

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean() + c.eps).sqrt() * weight

    def turned(x: torch.Tensor, at: int) -> torch.Tensor:
        half = c.head_dim // 2
        angle = at * c.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
        a, b = x[:half], x[half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    def project(x: torch.Tensor, name: str, count: int) -> list[torch.Tensor]:
        out = w[f"self_attn.{name}_proj.weight"] @ x + w.get(f"self_attn.{name}_proj.bias", 0.0)
        each = list(out.view(count, c.head_dim))
        norm = w.get(f"self_attn.{name}_norm.weight")
        return each if norm is None else [rms(e, norm) for e in each]

    keys: list[list[torch.Tensor]] = []
    values: list[list[torch.Tensor]] = []
    out = torch.empty(0)
    for i in range(len(text) - 1):
        token = rms(model.embed_tokens.weight[text[i + 1]], model.token_norm.weight)
        x = model.fc.weight @ torch.cat([token, rms(rows[i], model.hidden_norm.weight)])
        normed = rms(x, w["input_layernorm.weight"])
        keys.append([turned(k, i) for k in project(normed, "k", c.kv_heads)])
        values.append(project(normed, "v", c.kv_heads))
        seen = []
        for h, q in zip(heads, project(normed, "q", c.heads), strict=True):
            share = h * c.kv_heads // c.heads
            score = torch.stack([turned(q, i) @ k[share] for k in keys]) / c.head_dim**0.5
            seen.append((score.softmax(0)[:, None] * torch.stack([v[share] for v in values])).sum(0))
        x = x + w["self_attn.o_proj.weight"] @ torch.cat(seen)
        normed = rms(x, w["post_attention_layernorm.weight"])
        gate, up = (w[f"mlp.{part}_proj.weight"] @ normed for part in ("gate", "up"))
        x = x + w["mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)
        out = rms(x, model.norm.weight)
        if i + 1 >= len(rows):
            rows.append(out)
    return model.lm_head.weight @ out


@pytest.mark.parametrize("bias", [False, True])
def test_every_level_is_the_equations(bias: bool) -> None:
    model, text = head(bias), [3, 1, 4, 1, 5, 9, 2, 6]
    taps = states(tuple(text), (3,))
    g = model.read(taps)
    found = model.unroll(torch.tensor([text]), taps[None, :5], 3)
    for level, column in ((0, 0), (0, 4), (1, 2), (2, 0), (2, 4)):
        wanted = by_hand(model, text[: column + level + 2], g[: column + 1])
        torch.testing.assert_close(found[level][0, column], wanted, rtol=0, atol=1e-5)  # rotary angles are float32


@pytest.mark.parametrize("how", GROWTHS)
def test_cached_logits_are_those_of_training(how: str) -> None:
    """After any history of partial acceptances every logit served equals the training-time unroll of the same tokens."""
    model, seen = head(True), Seen(GROWTHS[how]())
    decode(EagleDrafter(model, seen, name="mtp"), 3)
    assert len(seen.logits) > 60
    for history, path, rows in seen.along():
        known = len(history) - 1
        found = model.unroll(torch.tensor([[*history, *path]]), states(history, (3,))[None, :known], len(rows))
        for row, level in zip(rows, found, strict=True):
            torch.testing.assert_close(row, level[0, known - 1], rtol=0, atol=2e-4)


# ---------------------------------------------------------------------------------------------- the heads of checkpoints
SEVERAL = {"qwen2": (3, 4), "deepseek_v3": (2, 3), "qwen3_next": (2, 3)}
ONE = [pytest.param(f, 1, 3, marks=pytest.mark.slow if f in ("deepseek_v3", "qwen3_next") else ()) for f in FAMILIES]


@pytest.mark.parametrize(("family", "heads", "length"), [*ONE, *((f, *sizes) for f, sizes in SEVERAL.items())])
def test_checkpoints_heads_are_the_equations_and_their_text_the_targets(
    family: str, heads: int, length: int, tmp_path: Path
) -> None:
    """Logits that are served, over histories of partial acceptance and chained beyond the trained depth, against float64."""
    plain = make_with_head(tmp_path, family, heads=heads)
    target = load_target(tmp_path, dtype="float32")
    drafter = load_drafter("mtp", target=target, length=length, target_path=str(tmp_path))
    assert isinstance(drafter, EagleDrafter) and drafter.name == "mtp"
    assert examine(str(tmp_path), "float32", 1, None)["mtp_heads"] == heads
    for model in [drafter.model, *(later.model for later in getattr(drafter, "later", ()))]:
        if isinstance(model, MtpNetwork):
            model.double()  # not compiled, nor rounded to bfloat16: test_native_drafts.py holds these together
    drafter.growth = seen = Seen(Levels(levels((1,) * length), VOCAB))  # type: ignore[assignment]
    drafter.bind(2, 40)
    caches = [drafter.cache, *(later.cache for later in getattr(drafter, "later", ()))]
    waiting = Backlog.size(2, 1, drafter.model.config.target_hidden, drafter.model.fc.weight.dtype)
    assert len(caches) == heads and sum(cache.bytes for cache in caches) + waiting == drafter.cache_need(2, 40).fixed
    engine = Engine(target, drafter, load_rule("speculative_sampling"), Fixed(length), slots=2, max_length=40, chunk=5)
    p = [SamplingParams(temperature=1.0, max_tokens=9, seed=i, ignore_eos=True) for i in range(len(PROMPTS))]
    engine.generate(PROMPTS, p)
    assert engine.counts.rejected > 5
    some = [item for n, item in enumerate(seen.logits.items()) if n % 7 == 0]
    assert {len(path) for (_, path), _ in some} == set(range(length))
    for (history, path), row in some:
        wanted = plain.logits(list(history), list(path))
        assert float((row.double() - wanted).abs().max()) < 2e-4 < float(wanted.std())

    drafts = ["mtp", "auto", *(["tree:2x1x2:mtp", "dynamic:6:mtp"] if target.trees and heads > 1 else [])]
    assert_plain_text(tmp_path, drafts, prompts=PROMPTS, length=length, slots=2)


def test_heads_in_float8_are_read_by_the_scales_of_their_blocks(tmp_path: Path) -> None:
    make_with_head(tmp_path, "deepseek_v3", heads=2)
    to_float8(tmp_path, 128)  # what config.json does not say
    stored, found = load_file(tmp_path / "model.safetensors"), carried(tmp_path)
    assert found is not None and found.depth == 2
    for head in range(2):
        name = f"model.layers.{LAYERS + head}.self_attn.o_proj.weight"
        assert stored[name].dtype == torch.float8_e4m3fn
        expected = stored[name].double() * stored[f"{name}_scale_inv"].double()
        assert found.tensors(head)["layers.0.self_attn.o_proj.weight"].double().equal(expected)
    assert_plain_text(tmp_path, ["mtp"], prompts=PROMPTS, tokens=10, length=3)
    stored[f"model.layers.{LAYERS}.self_attn.o_proj.weight_scale_inv"] = torch.ones(2, 2)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"o_proj\.weight of its MTP head is stored as float8_e4m3fn, without scales"):
        build_engine(tmp_path, "mtp", dtype="float32")


def test_blocks_of_float8_may_be_cut_at_the_edges() -> None:
    codes = torch.randn(5, 7).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 3)
    out = scaled_blocks(codes, scales, 2, 3)
    expected = [[float(codes[i, j]) * float(scales[i // 2, j // 3]) for j in range(7)] for i in range(5)]
    torch.testing.assert_close(out, torch.tensor(expected))
    torch.testing.assert_close(scaled_blocks(codes, scales[:1, :1], 1 << 40, 1 << 40), codes.float() * scales[0, 0])


def test_the_heads_tensors_are_known_and_others_are_not(tmp_path: Path) -> None:
    make_with_head(tmp_path, "qwen2")
    tensors = load_file(tmp_path / "model.safetensors")
    found = head_tensors(tensors, LAYERS)
    assert found == {n for n in tensors if "mtp_layers" in n} and found
    assert head_tensors({n: t for n, t in tensors.items() if "input_proj" not in n}, LAYERS) == set()
    deep = [f"model.layers.{n}.{part}.weight" for n in (1, 2, 3) for part in NAMES[f"model.layers.{LAYERS}."]]
    own = {n for n in deep if ".1." in n}
    assert head_tensors(deep, LAYERS) == set(deep) - own  # a second head, and none of the model's own
    for stray in ("model.layers.0.self_attn.q_proj.lora_A.weight", f"model.layers.{LAYERS}.self_attn.q_proj.weight"):
        save_file(tensors | {stray: torch.ones(2, 2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match="has no place|no place for"):
            load_target(tmp_path, dtype="float32")


def test_a_head_that_is_left_out_is_said_and_auto_uses_it(tmp_path: Path) -> None:
    make_with_head(tmp_path, "qwen2")
    left = build_engine(tmp_path, "ngram", dtype="float32")
    assert any("carries an MTP head, which is left out: --draft mtp" in notice for notice in left.notices)
    used = build_engine(tmp_path, "auto", dtype="float32")
    assert used.parts.drafter.name == "prediction+forced+mtp"
    assert not any("MTP" in notice for notice in used.notices)
    coupled = build_engine(tmp_path, "auto", rule="match", dtype="float32").parts.drafter
    assert isinstance(coupled, FirstOf) and coupled.parts[-1].growth.sample == "coupled"  # type: ignore[attr-defined]
    assert drafter_config("mtp", {}, str(tmp_path)) == {"method": "mtp", "draft_sample_method": "probabilistic"}


def test_heads_that_cannot_be_run_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "plain", "qwen2")
    target = load_target(folder, dtype="float32")
    with pytest.raises(ConfigError, match="no companion folder 'mtp', and its own carries none"):
        load_drafter("mtp", target=target, length=2, target_path=str(folder))
    with pytest.raises(ConfigError, match="holds a model of type 'qwen2', not 'mtp'"):
        load_drafter(f"mtp:{folder}", target=target, length=2)
    make_with_head(tmp_path / "other", "qwen2")
    with pytest.raises(CapabilityError, match="was trained for a target of width 32"):
        load_drafter(f"mtp:{tmp_path / 'other'}", target=target, length=2)
    make_with_head(tmp_path / "codes", "glm4_moe")
    file = tmp_path / "codes" / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.{LAYERS}.eh_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file, metadata={"format": "pt"})
    coded = build_engine(tmp_path / "codes", "auto", dtype="float32")
    assert coded.parts.drafter.name == "prediction+forced+ngram"  # auto does without, and says so
    assert any("--draft mtp" in notice for notice in coded.notices)
    with pytest.raises(ConfigError, match=r"eh_proj\.weight of its MTP head is stored as float8_e4m3fn"):
        build_engine(tmp_path / "codes", "mtp", dtype="float32")
    dropped = {n: t for n, t in tensors.items() if not n.startswith(f"model.layers.{LAYERS}.self_attn.q_proj")}
    save_file(dropped, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="is not one of glm4_moe as transformers has it"):
        build_engine(tmp_path / "codes", "mtp", dtype="float32")


def test_a_trained_head_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = new_head(MtpConfig(H, H, (3,), V, 2, 1, 8, 20), TARGET, seed=2)
    model.save(tmp_path / "mtp", "some/target")
    assert json.loads((tmp_path / "mtp" / "config.json").read_text())["base_model"] == "some/target"
    read = MtpNetwork.load(tmp_path / "mtp", TARGET)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(read.state_dict()[name], value.float(), rtol=8e-3, atol=1e-6)
    assert load_drafter(str(tmp_path / "mtp"), target=TARGET, length=2).name == "mtp"  # a folder says what it holds


@pytest.mark.skipif(library_for(torch.ones(1)) is None, reason="compiled drafters need a C++ compiler")
def test_a_dense_head_is_compiled(tmp_path: Path) -> None:
    make_with_head(tmp_path, "qwen2")
    network = MtpNetwork.load(tmp_path, load_target(tmp_path, dtype="float32"))
    assert isinstance(forward_of(network, 32), NativeForward)


def test_mimo_is_read_without_its_code(tmp_path: Path) -> None:
    """Its checkpoints name code of their own; the network is Qwen2's with a head, and nothing of theirs is run."""
    make_with_head(tmp_path, "qwen2")
    greedy = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    before = build_engine(tmp_path, "none", dtype="float32").generate(PROMPTS, greedy)
    file = tmp_path / "config.json"
    own = {"model_type": "mimo", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    own["auto_map"] = {"AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM"}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    (tmp_path / "modeling_mimo.py").write_text("raise SystemExit('it was run')")
    engine = build_engine(tmp_path, "mtp", dtype="float32")
    found = engine.generate(PROMPTS, greedy)
    assert [r.outputs[0].token_ids for r in found] == [r.outputs[0].token_ids for r in before]
    assert examine(str(tmp_path), "float32", 1, None)["mtp_heads"] == 1


def test_what_loading_refuses_as_no_decoder_the_doctor_refuses(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "dim_head": 8,
        "dim_ff": 24,
        "num_hidden_layers": 1,
        "vocab_size": 40,
    }
    config = AutoConfig.for_model("cpmant", **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for check in (inspect_checkpoint, load_target):
        with pytest.raises(ConfigError, match="CpmAntForCausalLM is no decoder"):
            check(tmp_path, dtype="float32")


def test_what_a_configuration_claims_is_bounded_before_it_is_made(tmp_path: Path) -> None:
    """Layers are counted before a model is made of them; masks, as GPT-Neo's of all positions, are counted with parameters."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model("gpt_neo", attention_types=[[["global", "local"], 1]], **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain | {"max_position_embeddings": 10**6}))
    assert inspect_checkpoint(tmp_path, dtype="float32").max_length == 10**6
    file.write_text(json.dumps(plain | {"text_config": {"num_layers": 10**9}}))
    for check in (inspect_checkpoint, load_target):
        with pytest.raises(ConfigError, match=r"layers 1000000000 is more than 1024: check its configuration"):
            check(tmp_path, dtype="float32")


def test_a_head_in_one_of_many_files_is_read(tmp_path: Path) -> None:
    """The index of a model with many experts is longer than a drafter's own may be."""
    make_with_head(tmp_path, "qwen2")
    single = tmp_path / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    parts = {f"model-{n}.safetensors": {k: t for k, t in tensors.items() if ("mtp" in k) == n} for n in (False, True)}
    for name, part in parts.items():
        save_file(part, tmp_path / name, metadata={"format": "pt"})
    index = {
        "metadata": {"note": "x" * (2 << 20)},
        "weight_map": {k: name for name, part in parts.items() for k in part},
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    target = load_target(tmp_path, dtype="float32")
    assert load_drafter("mtp", target=target, length=2, target_path=str(tmp_path)).name == "mtp"
    file = next(tmp_path.glob("*True*"))
    save_file({k: t for k, t in load_file(file).items() if "input_proj" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="fc.weight is not there"):
        load_drafter("mtp", target=target, length=2, target_path=str(tmp_path))
