"""The lean runtime against transformers' own models: every family and option, prompts, drafts, trees and batches.

Tolerances. float64: 1e-9, a few thousand roundings of numbers up to 30; transformers normalises in float32 whatever the dtype, so
its RMSNorm is replaced by the same formula in float64; Gemma 2's softmax stays in float32 there. float32: 2e-4 on logits whose
standard deviation is above 1.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from outrider.errors import CapabilityError, CapacityError, RequestError
from outrider.models.checkpoint import load_checkpoint
from outrider.models.lean import LeanTarget
from outrider.types import Draft, Rows
from tests.checkpoints import make_checkpoint

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
ROPE = {"rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 300.0,
    "short_factor": [1.0, 1.5, 2, 2.5, 3, 3.5],
    "long_factor": [2.0] * 6,
}
CASES = {
    "llama grouped heads": ("llama", {}),
    "llama tied, equal heads": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama one key head": ("llama", {"num_key_value_heads": 1}),
    "llama biases": ("llama", {"attention_bias": True}),
    "llama odd sizes": ("llama", {"vocab_size": 97, "hidden_size": 36, "intermediate_size": 51, "head_dim": 14}),
    "llama linear scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0}}),
    "llama 3 scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0} | ROPE},
    ),
    "llama yarn": ("llama", {"rope_parameters": {"rope_type": "yarn"} | ROPE}),
    "qwen2": ("qwen2", {}),
    "qwen2 windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2 layer types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3 biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral window": ("mistral", {"sliding_window": 6}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma2 without bounds": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", {}),
    "phi3": ("phi3", {}),
    "phi3 part, window": (
        "phi3",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
            "sliding_window": 6,
        },
    ),
    "phi3 longrope": (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 64, "max_position_embeddings": 64},
    ),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "granite biases": ("granite", {"attention_bias": True}),
    "smollm3": ("smollm3", {}),
    "glm4": ("glm4", {}),
    "mixtral": ("mixtral", {"sliding_window": 6}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe normalised, a dense layer": (
        "qwen3_moe",
        {"norm_topk_prob": True, "mlp_only_layers": [1], "attention_bias": True},
    ),
    "qwen3_moe every other layer": (
        "qwen3_moe",
        {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 5},
    ),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe normalised, a dense layer, windows": (
        "qwen2_moe",
        {
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "olmoe": ("olmoe", {}),
    "olmoe clipped": ("olmoe", {"clip_qkv": 0.7, "norm_topk_prob": True, "attention_bias": True}),
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss one expert, no biases": (
        "gpt_oss",
        {"num_experts_per_tok": 1, "attention_bias": False, "num_key_value_heads": 4},
    ),
    "llama packed": ("llama", {"hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 1}),
}
LATER = (
    "gemma",
    "gemma2",
    "gemma3",
    "phi3 part, window",
    "phi3 longrope",
    "olmo2",
    "granite biases",
    "smollm3",
    "glm4",
)
"""A case of each family that came after the first four."""
SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
"""Families with experts: transformers has them in float32 and lower alone."""
PROMPT = torch.randint(0, 97, (23,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """(case, dtype, native) -> the lean target and transformers' model of one checkpoint."""

    @cache
    def folder(case: str) -> Path:
        family, overrides = CASES[case]
        return make_checkpoint(tmp_path_factory.mktemp("model"), family, **overrides)

    @cache
    def pair(case: str, dtype: torch.dtype, native: bool = False) -> tuple[LeanTarget, PreTrainedModel]:
        path, family = folder(case), CASES[case][0]
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        if getattr(model.config, "attn_logit_softcapping", None):
            model.set_attn_implementation("eager")  # the fused one has no cap, and does not say so in every release
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = _exact_norm(module, 1.0 if family.startswith("gemma") else 0.0)
        return LeanTarget(*load_checkpoint(path, dtype), native=native), model

    return pair


def _exact_norm(module, shift: float):
    eps = getattr(module, "variance_epsilon", None) or module.eps

    def forward(x):
        return (shift + module.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    return forward


def distribution_of(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """transformers' logits after `tokens`, computed from scratch."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1]


def close(ours: torch.Tensor, theirs: torch.Tensor, case: str = "") -> None:
    """case: of Gemma 2 the softmax of the other side is float32 in any case."""
    assert ours.dtype == theirs.dtype
    tolerance = TOLERANCE[torch.float32 if case.startswith("gemma2") else theirs.dtype]
    assert (ours - theirs).abs().max().item() < tolerance


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, d) for c in CASES for d in TOLERANCE if d is torch.float32 or CASES[c][0] not in SPARSE],
)
def test_logits_and_hidden_states_equal_transformers(case, dtype, make):
    target, model = make(case, dtype)
    taps = tuple(range(target.layers + 1))
    drafted = 14
    chain = Draft(torch.tensor(PROMPT[-drafted:]), tuple(range(-1, drafted - 1)), (drafted,))
    rows = Rows.assemble([1], [PROMPT[:-drafted]], [0], chain)
    scores = target.forward(rows, target.new_kv(2, 40), layers=taps)
    with torch.no_grad():
        plain = model(torch.tensor([PROMPT]), output_hidden_states=True)
    assert plain.logits.std() > 0.5
    close(scores.logits, plain.logits[0, -drafted - 1 :], case)
    assert len(scores.hidden) == target.layers + 1
    for i in taps[:-1]:
        close(scores.hidden[i], plain.hidden_states[i][0], case)
    close(target.unembed(scores.hidden[-1]), plain.logits[0], case)  # transformers' last state is the normed one
    torch.testing.assert_close(target.embed(torch.tensor(PROMPT)), scores.hidden[0])


WAYS = [(torch.float64, False), (torch.float32, False), (torch.float32, True)]
TREES = ["llama grouped heads", "qwen2 windows", "qwen3", "mistral window", *LATER]
SPARSE_TREES = ["mixtral", "qwen2_moe", "qwen3_moe normalised, a dense layer", "olmoe clipped", "gpt_oss"]


@pytest.mark.parametrize(
    ("case", "dtype", "native"),
    [(case, *way) for case in TREES for way in WAYS] + [(case, *way) for case in SPARSE_TREES for way in WAYS[1:]],
)
def test_chunks_trees_and_commits_equal_recomputing_every_path(case, dtype, native, make):
    target, model = make(case, dtype, native)
    kv = target.new_kv(3, 64)
    first, second = PROMPT, PROMPT[3:12]
    rows = Rows.assemble([2, 0], [first[:8], second[:-1]], [0, 0], Draft.empty(0), [False, False])
    target.forward(rows, kv)
    kv.commit(rows, [[], []])
    #        0 - 1 - 2          0, 1, 2 below the first anchor; 5, 6 below the second
    #         \- 3 - 4
    tree = Draft(torch.tensor([9, 4, 77, 30, 8, 11, 12]), (-1, 0, 1, 0, 3, -1, -1), (5, 2))
    rows = Rows.assemble([2, 0], [first[8:], second[-1:]], [8, 8], tree)
    logits = target.forward(rows, kv).logits
    close(logits[0], distribution_of(model, first), case)
    close(logits[1], distribution_of(model, second), case)
    for node in range(7):
        stem = first if node < 5 else second
        close(logits[2 + node], distribution_of(model, stem + [tree.tokens[k] for k in tree.path_to(node)]), case)
    kv.commit(rows, [[0, 3, 4], [1]])
    assert kv.length == [10, 0, 26]
    more = Draft(torch.tensor([3, 5]), (-1, 0), (2, 0))
    rows = Rows.assemble([2, 0], [[60], [61]], [26, 10], more)
    logits = target.forward(rows, kv).logits
    close(logits[0], distribution_of(model, [*first, 9, 30, 8, 60]), case)
    close(logits[1], distribution_of(model, [*second, 12, 61]), case)
    close(logits[3], distribution_of(model, [*first, 9, 30, 8, 60, 3, 5]), case)


@pytest.mark.parametrize("case", ["llama grouped heads", "llama tied, equal heads", "mistral window"])
@pytest.mark.parametrize("drafted", [0, 3])
def test_a_batch_in_neighbouring_slots_equals_one_at_a_time(case, drafted, make):
    """Segments of equal size share an attention call there; lengths near and far apart, to have both kinds of call."""
    target, _ = make(case, torch.float64)
    kv, lengths = target.new_kv(6, 64), [9, 10, 12, 2, 23]
    for slot, length in enumerate(lengths):
        rows = Rows.assemble([slot], [PROMPT[:length]], [0], Draft.empty(1))
        target.forward(rows, kv)
        kv.commit(rows, [[]])
    nodes = torch.arange(drafted * len(lengths)) % 7
    parents = tuple((-1 if k % drafted == 0 else k - 1) for k in range(len(nodes)))
    draft = Draft(nodes, parents, (drafted,) * len(lengths))
    slots = list(range(len(lengths)))
    together = target.forward(Rows.assemble(slots, [[s + 1] for s in slots], lengths, draft), kv).logits
    for s in slots:
        alone = target.forward(Rows.assemble([s], [[s + 1]], [lengths[s]], draft.take([s])), kv).logits
        close(together[[s, *(len(slots) + k for k in range(s * drafted, (s + 1) * drafted))]], alone)


def test_native_rows_do_not_depend_on_their_neighbours_bit_for_bit(make):
    """Decode rows beside a long prompt, with and without drafts: the same bits."""
    target, _ = make("qwen3", torch.float32, True)
    if target.native is None:
        pytest.skip("no C++ compiler here: without the native decoder equality is up to rounding")
    kv = target.new_kv(3, 128)
    prompt = [(7 * i) % 97 for i in range(80)]
    for slot, length in ((0, 11), (1, 17)):
        rows = Rows.assemble([slot], [PROMPT[:length]], [0], Draft.empty(1))
        target.forward(rows, kv)
        kv.commit(rows, [[]])
    alone = target.forward(Rows.assemble([0], [[5]], [11], Draft.empty(1)), kv)
    prompt_alone = target.forward(Rows.assemble([2], [prompt], [0], Draft.empty(1)), kv)
    draft = Draft(torch.tensor([1, 2, 3, 4]), (-1, 0, -1, 0), (1, 0, 3))
    rows = Rows.assemble([1, 2, 0], [[8], prompt, [5]], [17, 0, 11], draft)
    mixed = target.forward(rows, kv, layers=(0, 2))
    assert torch.equal(mixed.logits[2], alone.logits[0])
    assert torch.equal(mixed.logits[1], prompt_alone.logits[0])
    assert mixed.logits.shape == (7, target.vocab_size)
    assert torch.equal(mixed.hidden[0], target.embed(rows.token))
    assert torch.allclose(target.unembed(mixed.hidden[1][:0]), mixed.logits[:0])
    one = target.forward(Rows.assemble([1], [[8]], [17], draft.take([0])), kv, layers=(0, 2))
    assert torch.equal(mixed.logits[[0, 3]], one.logits)
    assert torch.equal(mixed.hidden[1][:2], one.hidden[1])


def test_only_scored_segments_get_logits(make):
    target, model = make("llama grouped heads", torch.float64)
    kv = target.new_kv(2, 64)
    rows = Rows.assemble([0, 1], [PROMPT[:5], PROMPT[:7]], [0, 0], Draft.empty(1), [False, True])
    logits = target.forward(rows, kv).logits
    assert logits.shape == (1, target.vocab_size)
    close(logits[0], distribution_of(model, PROMPT[:7]))


def test_scores_are_ordinary_tensors(make):
    """Rules change logits in place and training differentiates through hidden states: no inference tensors come out."""
    target, _ = make("llama grouped heads", torch.float32)
    rows = Rows.assemble([0], [PROMPT[:5]], [0], Draft.empty(1))
    scores = target.forward(rows, target.new_kv(1, 16), layers=(1,))
    scores.logits.div_(2.0)
    weight = torch.ones(target.hidden_size, requires_grad=True)
    (scores.hidden[0] * weight).sum().backward()
    assert weight.grad is not None


def test_gradients_flow_through_the_unembedding(make):
    """A drafter's states are trained against the target's head."""
    target, _ = make("llama grouped heads", torch.float32)
    hidden = torch.ones(2, target.hidden_size, requires_grad=True)
    target.unembed(hidden).logsumexp(-1).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_stays_near_float32(make, native, tmp_path):
    """Weights and states rounded to 8 bits: total variation of the distributions below 0.1, where unrelated ones have 0.8."""
    folder = make_checkpoint(tmp_path, "qwen3")
    wide, narrow = (LeanTarget(*load_checkpoint(folder, d), native=native) for d in (torch.float32, torch.bfloat16))
    tokens = [(5 * i) % 97 for i in range(50)]
    p, q = (torch.softmax(_last(target, tokens), -1) for target in (wide, narrow))
    assert p.dtype == q.dtype == torch.float32
    assert (p - q).abs().sum().item() / 2 < 0.1
    assert (p - torch.softmax(_last(wide, tokens[:-1]), -1)).abs().sum().item() / 2 > 0.5


def test_what_a_step_reads(tmp_path):
    """The bytes of the tensors that a row is multiplied with, and of a cached token in the cache itself."""
    folder = make_checkpoint(tmp_path, "qwen3")
    target = LeanTarget(*load_checkpoint(folder, torch.bfloat16), native=True)
    if target.native is None:
        pytest.skip("no compiled decoder here")
    _, weights = load_checkpoint(folder, torch.bfloat16)
    weights = weights() if callable(weights) else weights
    read = [m for layer in weights.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)] + [weights.head]
    kv = target.new_kv(1, 64)
    assert target.step_bytes == (sum(m.nbytes for m in read), 2 * kv.k[:, :, 0].nbytes)
    assert LeanTarget(*load_checkpoint(folder, torch.bfloat16), native=False).step_bytes is None


def _last(target: LeanTarget, tokens: list[int]) -> torch.Tensor:
    return target.forward(Rows.assemble([0], [tokens], [0], Draft.empty(1)), target.new_kv(1, 64)).logits[0]


def test_what_does_not_fit_is_refused_in_a_sentence(make):
    target, _ = make("llama grouped heads", torch.float32)
    kv = target.new_kv(1, 8)
    with pytest.raises(CapacityError, match="max_length"):
        target.forward(Rows.assemble([0], [PROMPT], [0], Draft.empty(1)), kv)
    with pytest.raises(RequestError, match="vocabulary of 101"):
        target.forward(Rows.assemble([0], [[1, 500]], [0], Draft.empty(1)), kv)
    with pytest.raises(CapabilityError, match="blocks 1 to 3"):
        target.forward(Rows.assemble([0], [[1]], [0], Draft.empty(1)), kv, layers=(4,))
    with pytest.raises(CapacityError, match="lower max_length"):
        target.new_kv(1 << 20, 1 << 20)
