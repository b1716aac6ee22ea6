"""How model types speak of their experts in `config.json` and in the names of their tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertKeys:
    """How a model type speaks of its experts, and transformers' defaults of absent keys.

    place: the module of experts and router in a block. parts: gate, up and down of an expert. inner: the key of an expert's units
    and its default, None if it is intermediate_size. normalised: None if norm_topk_prob says it. steps: some layers may be dense.
    shared: the key of the units of an expert that every row uses, and its default; None: there is none.
    bounded: units are those of gpt-oss (see `decoder.Experts`), router and experts have biases, and gates and ups take turns,
    in tensors [E, inputs, outputs].
    """

    place: str
    parts: tuple[str, str, str]
    count: int
    used: int
    inner: tuple[str, int] | None = None
    normalised: bool | None = None
    steps: bool = False
    bounded: bool = False
    shared: tuple[str, int] | None = None

    @property
    def known(self) -> frozenset[str]:
        """Keys that are read, or that matter for training alone."""
        out = {
            "num_experts",
            "num_local_experts",
            "num_experts_per_tok",
            "output_router_logits",
            "router_aux_loss_coef",
        }
        out |= {"norm_topk_prob"} if self.normalised is None else {"router_jitter_noise"}
        out |= {"decoder_sparse_step", "mlp_only_layers"} if self.steps else set()
        out |= (
            {"swiglu_limit", "swiglu_alpha", "experts_per_token", "initial_context_length"} if self.bounded else set()
        )
        return frozenset(out | {key[0] for key in (self.inner, self.shared) if key})


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ExpertKeys("block_sparse_moe", ("w1", "w3", "w2"), 8, 2, normalised=True)
QWEN3_MOE = ExpertKeys("mlp", _PROJECTIONS, 128, 8, inner=("moe_intermediate_size", 768), steps=True)
QWEN2_MOE = ExpertKeys(
    "mlp", _PROJECTIONS, 60, 4, inner=("moe_intermediate_size", 1408), steps=True,
    shared=("shared_expert_intermediate_size", 5632),
)  # fmt: skip
OLMOE = ExpertKeys("mlp", _PROJECTIONS, 64, 8)
GPT_OSS = ExpertKeys("mlp", _PROJECTIONS, 128, 4, normalised=True, bounded=True)
LIMIT, GAIN = 7.0, 1.702
"""gpt-oss's bound of gates and ups, and the factor of the gate in the sigmoid, where a file does not say them."""
PLACES = {"qwen2_moe": QWEN2_MOE, "mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE, "olmoe": OLMOE, "gpt_oss": GPT_OSS}
"""By `DecoderConfig.family`."""
