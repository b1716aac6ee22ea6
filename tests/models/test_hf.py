"""The Hugging Face adapter against the plain model, family by family: prompts, chunks, partial acceptance, trees, taps.

path       families
seam       llama qwen2 qwen3 mistral gemma2 gemma3 phi phi3 cohere2 olmo2 gpt2 gpt_bigcode opt gpt_neox mixtral
           qwen2_moe gpt_oss deepseek_v3 gemma4
cache      stablelm falcon bloom mpt gpt_neo llama4, gptj until transformers 5.23 (later: seam)
snapshots  mamba mamba2 jamba qwen3_next lfm2 rwkv
recompute  openai-gpt
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, RwkvForCausalLM

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.model.drafter import ModelDrafter
from outrider.errors import CapabilityError, CapacityError, ConfigError
from outrider.models.hf.target import HFTarget
from outrider.params import SamplingParams
from outrider.types import Draft, Rows
from outrider.verify import load_rule
from tests.models.hf_families import EXACT, FAMILIES, NEW, SPREAD, V, build, plain


def chain(*counts: int) -> Draft:
    parent = [
        p for n, first in zip(counts, _offsets(counts), strict=True) for p in [-1, *range(first, first + n - 1)][:n]
    ]
    return Draft((torch.arange(len(parent)) * 11 + 5) % V, tuple(parent), counts)


def _offsets(counts: tuple[int, ...]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts))]


TREE = Draft(torch.tensor([7, 8, 9, 10, 11, 12, 13, 14]), (-1, -1, 0, 1, 1, 3, -1, 6), (6, 0, 2))
"""Anchor children 0 and 1 (6 for the third sequence), grandchildren below both, one of depth three."""


PATHS = ("seam", "cache", "snapshots", "recurrent", "recompute")
"""The best first. A release of transformers may move a family up (GPT-J in 5.24); the test is that none moves down."""


class Replay:
    """A target beside the plain model: every scored row is compared with a full recomputation of its path."""

    def __init__(self, model: PreTrainedModel, tolerance: float) -> None:
        self.model, self.target, self.tolerance = model, HFTarget(model), tolerance
        self.kv = self.target.new_kv(4, 40)
        self.text: dict[int, list[int]] = {}
        self.worst = 0.0

    def step(
        self, slots: list[int], prefixes: list[list[int]], draft: Draft, keep: list[list[int]], unscored: int = -1
    ) -> None:
        scored = [s != unscored for s in slots]
        cached = [len(self.text.get(s, [])) for s in slots]
        rows = Rows.assemble(slots, prefixes, cached, draft, scored)
        self.kv.reserve(rows)
        scores = self.target.forward(rows, self.kv)
        whole = {s: self.text.get(s, []) + prefix for s, prefix in zip(slots, prefixes, strict=True)}
        judged = [s for s, want in zip(slots, scored, strict=True) if want]
        want = [whole[s] for s in judged]
        for b, s in enumerate(judged):
            for k in range(draft.offsets[b], draft.offsets[b + 1]):
                want.append(whole[s] + [draft.tokens[i] for i in draft.path_to(k)])
        for row, tokens in enumerate(want):
            self.worst = max(self.worst, float((scores.logits[row] - plain(self.model, tokens)).abs().max()))
        assert self.worst < self.tolerance, f"row off by {self.worst:.2e} on path {self.target.path}"
        self.kv.commit(rows, [keep[judged.index(s)] if s in judged else [] for s in slots])
        for s in slots:
            kept = (
                []
                if s not in judged
                else [draft.tokens[draft.offsets[judged.index(s)] + i] for i in keep[judged.index(s)]]
            )
            self.text[s] = whole[s] + kept


PROMPTS = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33, 34]]


def run_all(replay: Replay) -> None:
    """Ragged prompts in mixed slots, one of them in two chunks; partial acceptance; release and reuse of a slot."""
    target, slots = replay.target, [2, 0, 3]
    draft = chain(3, 0, 2) if target.rewinds else Draft.empty(3)
    first = [[0], [], [0, 1]] if target.rewinds else [[], [], []]
    replay.step([1], [[40, 41, 42, 43]], Draft.empty(0), [], unscored=1)
    replay.step(slots, PROMPTS, TREE if target.trees else draft, [[1, 3], [], [0]] if target.trees else first)
    replay.step([1, *slots], [[44, 45, 46], [50], [51], [52]], _more(target), [[], [], [], []])
    replay.step(
        [0, 2],
        [[53], [54]],
        chain(4, 1) if target.rewinds else Draft.empty(2),
        [[0, 1], []] if target.rewinds else [[], []],
    )
    replay.kv.release([2])
    replay.text.pop(2)
    replay.step([2, 0], [[1, 2, 3], [55]], Draft.empty(2), [[], []])


def _more(target: HFTarget) -> Draft:
    if target.trees:
        return Draft(TREE.token, TREE.parent, (6, 0, 2, 0))
    return chain(2, 1, 0, 3) if target.rewinds else Draft.empty(4)


@pytest.mark.parametrize("family", SPREAD)
def test_rows_equal_the_plain_model(family: str) -> None:
    replay = Replay(build(family), 1e-4)
    paths = list(PATHS)
    assert paths.index(replay.target.path) <= paths.index(FAMILIES[family][0]), replay.target.why
    run_all(replay)
    print(f"{family:14s} {replay.target.path:10s} worst logit error {replay.worst:.1e}")


@pytest.mark.parametrize("family", EXACT)
def test_rows_equal_the_plain_model_in_float64(family: str) -> None:
    replay = Replay(build(family, torch.float64), 1e-9)
    run_all(replay)
    assert replay.target.dtype == torch.float64


@pytest.mark.parametrize("family", SPREAD)
def test_hidden_states_and_unembedding(family: str) -> None:
    model = build(family)
    target = HFTarget(model)
    layers = tuple(range(target.layers + 1))
    rows = Rows.assemble([1, 0], [PROMPTS[0], PROMPTS[1]], [0, 0], Draft.empty(2))
    scores = target.forward(rows, target.new_kv(2, 16), layers=layers)
    with torch.no_grad():
        out = model(input_ids=torch.tensor([PROMPTS[0]]), output_hidden_states=True)
    late = int(family in ("mamba", "mamba2", "rwkv"))  # these report no embeddings
    for i in layers[late:-1]:  # transformers reports the last one behind the final norm
        assert scores.hidden[i].shape == (rows.count, target.hidden_size)
        torch.testing.assert_close(scores.hidden[i][:9], out.hidden_states[i - late][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(target.unembed(scores.hidden[-1])[:9], out.logits[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(target.unembed(scores.hidden[-1])[rows.scored], scores.logits, atol=1e-4, rtol=1e-4)
    assert target.embed(rows.token).shape == (rows.count, target.hidden_size)


def test_unembed_passes_gradients_and_freezes_weights() -> None:
    target = HFTarget(build("gemma2"))
    hidden = torch.randn(3, 32, requires_grad=True)
    target.unembed(hidden).square().sum().backward()
    assert hidden.grad is not None
    assert not any(p.requires_grad for p in target.model.parameters())


def test_half_precision_logits_come_in_float32() -> None:
    target = HFTarget(build("llama", torch.bfloat16))
    rows = Rows.assemble([0], [PROMPTS[0]], [0], chain(2))
    assert target.path == "seam"
    assert target.forward(rows, target.new_kv(1, 16)).logits.dtype == torch.float32


def test_the_model_is_left_as_it_was() -> None:
    model = build("llama")
    before, own = plain(model, PROMPTS[0]), model.config._attn_implementation
    target = HFTarget(model)
    bad, kv = Rows.assemble([0], [[V + 3]], [0], Draft.empty(1)), target.new_kv(1, 4)
    with pytest.raises(IndexError):
        target.forward(bad, kv)
    assert model.config._attn_implementation == own
    assert torch.equal(plain(model, PROMPTS[0]), before)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 12,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [4.0, 6.0, 8.0, 9.0],
}


def longrope() -> PreTrainedModel:
    """Rotary frequencies of one kind for texts of up to 12 tokens, of another beyond."""
    torch.manual_seed(0)
    sizes = {**NEW, "rope_parameters": LONGROPE, "original_max_position_embeddings": 12}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **sizes)).eval()


def test_long_rotary_scaling_leaves_the_seam() -> None:
    """Frequencies that depend on the longest row would let one sequence change its neighbours' numbers."""
    target = HFTarget(longrope())
    assert target.path == "cache"
    assert "beyond 12 tokens" in target.why["seam"]
    assert "max_length to at most 12" in target.notices[0]
    assert HFTarget(longrope(), max_length=12).path == "seam"
    growing = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = AutoConfig.for_model("llama", **{**NEW, "rope_parameters": growing})
    assert HFTarget(AutoModelForCausalLM.from_config(config)).path == "seam"  # within the native length nothing changes


def test_a_text_that_outgrows_its_rotary_frequencies_is_read_again() -> None:
    """Chunks, drafts and rejections on both sides of the limit, and hidden states, are those of the whole text."""
    model = longrope()
    replay = Replay(model, 1e-4)
    run_all(replay)
    replay.step([1], [[1] * 9], chain(5), [[0, 1]])  # straddles, is rejected on the far side
    replay.step([3], [[7]], chain(3), [[]])
    replay.kv.truncate(1, 10)
    replay.text[1] = replay.text[1][:10]
    replay.step([1], [[4]], chain(4), [[0, 1, 2, 3]])
    target, text = replay.target, [(5 * i + 2) % V for i in range(16)]
    rows = Rows.assemble([0], [text], [0], Draft.empty(1))
    heard = target.forward(rows, target.new_kv(1, 20), layers=(1, target.layers))
    with torch.no_grad():
        first = model(input_ids=torch.tensor([text[:12]]), output_hidden_states=True).hidden_states[1][0]
        whole = model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states[1][0, 12:]
    torch.testing.assert_close(heard.hidden[0], torch.cat([first, whole]), atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------- refusals
def test_trees_need_the_seam() -> None:
    target = HFTarget(build("bloom"))
    assert not target.trees
    assert target.rewinds
    with pytest.raises(CapabilityError, match="chain"):
        target.forward(Rows.assemble([0, 1, 2], PROMPTS, [0, 0, 0], TREE), target.new_kv(3, 30))


@pytest.mark.parametrize("slots", [1, 3])
def test_a_model_drafts_trees_for_itself(slots: int) -> None:
    """A tree asks for the logits of its last level alone; alone in a step too, where these are not all of the last rows."""
    model = HFTarget(build("llama"))
    drafter = ModelDrafter(model, 3, branching=(2, 1, 1), siblings="without_replacement")
    one = Engine(model, drafter, load_rule("traversal"), Fixed(3), slots=slots, max_length=60)
    one.generate(PROMPTS, SamplingParams(max_tokens=21, ignore_eos=True, seed=1))
    assert one.defects == 0
    assert one.counts.rejected == 0
    assert one.counts.accepted == one.counts.judged > 30


class Sealed:
    """A state that shows nothing of itself: it can be passed on, and neither be copied nor be cut."""

    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        self.inner = inner


class SealedRwkv(RwkvForCausalLM):
    """RWKV that hands out its state in a `Sealed`."""

    def forward(self, input_ids: Any = None, state: Any = None, **kwargs: Any) -> Any:
        out = super().forward(input_ids=input_ids, state=None if state is None else state.inner, **kwargs)
        if out.get("state") is not None:
            held = Sealed(None) if state is None else state
            held.inner = out["state"]
            out["state"] = held
        return out


def test_states_that_cannot_be_copied_refuse_drafts_and_rewinding() -> None:
    model = copy.deepcopy(build("rwkv"))
    model.__class__ = SealedRwkv
    target = HFTarget(model)
    assert target.path == "recurrent"
    assert "differ" in target.why["snapshots"]
    kv = target.new_kv(1, 30)
    assert not target.rewinds
    assert not target.trees
    with pytest.raises(CapabilityError, match="without a drafter"):
        target.forward(Rows.assemble([0], [[1, 2]], [0], chain(1)), kv)
    rows = Rows.assemble([0], [[1, 2]], [0], Draft.empty(1))
    target.forward(rows, kv)
    kv.commit(rows, [[]])
    with pytest.raises(CapabilityError, match="release"):
        kv.truncate(0, 1)
    kv.truncate(0, 0)
    target.forward(rows, kv)


@pytest.mark.parametrize("family", ["llama", "bloom", "mamba", "rwkv", "mamba2"])
def test_a_repeated_or_truncated_forward_starts_from_what_was_committed(family: str) -> None:
    model = build(family)
    target = HFTarget(model)
    kv = target.new_kv(1, 30)
    rows = Rows.assemble([0], [PROMPTS[0]], [0], chain(2))
    target.forward(rows, kv)
    target.forward(rows, kv)
    kv.commit(rows, [[0, 1]])
    kv.truncate(0, 4)
    again = target.forward(Rows.assemble([0], [[9]], [4], Draft.empty(1)), kv)
    torch.testing.assert_close(again.logits[0], plain(model, [*PROMPTS[0][:4], 9]), atol=1e-4, rtol=1e-4)


def test_capacity_is_checked_before_anything_is_computed() -> None:
    for family in ("llama", "bloom"):
        target = HFTarget(build(family))
        kv = target.new_kv(1, 8)
        with pytest.raises(CapacityError, match="room for 8"):
            kv.reserve(Rows.assemble([0], [PROMPTS[0]], [0], Draft.empty(1)))
        with pytest.raises(CapacityError, match="expects 3"):
            kv.reserve(Rows.assemble([0], [[1]], [3], Draft.empty(1)))


def test_limits_are_named() -> None:
    model = build("gpt2")
    with pytest.raises(ConfigError, match="64 positions"):
        HFTarget(model, max_length=65)
    target = HFTarget(model, max_length=32)
    assert target.max_length == 32
    with pytest.raises(CapabilityError, match="layer 9"):
        target.forward(Rows.assemble([0], [[1]], [0], Draft.empty(1)), target.new_kv(1, 8), layers=(9,))


@pytest.mark.parametrize("family", ["llama", "bloom", "mamba", "gemma2"])
def test_half_precision_finds_the_same_path(family: str) -> None:
    """Mamba's later chunks go token by token in any precision: its chunked scan forgets the state it had."""
    full, half = HFTarget(build(family)), HFTarget(build(family, torch.bfloat16))
    assert half.path == full.path == FAMILIES[family][0]
    logits = []
    for target in (full, half):
        kv = target.new_kv(1, 16)
        rows = Rows.assemble([0], [PROMPTS[0][:4]], [0], Draft.empty(1))
        target.forward(rows, kv)
        kv.commit(rows, [[]])
        logits.append(target.forward(Rows.assemble([0], [PROMPTS[0][4:]], [4], Draft.empty(1)), kv).logits[0])
    assert float((logits[0] - logits[1]).abs().max() / logits[0].std()) < 0.08
