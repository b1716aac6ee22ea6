"""How model types speak of their experts in `config.json` and in the names of their tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertKeys:
    """How a model type speaks of its experts, and transformers' defaults of absent keys.

    place: the module of experts and router in a block. parts: gate, up and down of an expert. inner: the key of an expert's units
    and its default, None if it is intermediate_size. normalised: None if norm_topk_prob says it. steps: whether some layers may be
    dense.
    """

    place: str
    parts: tuple[str, str, str]
    count: int
    used: int
    inner: tuple[str, int] | None = None
    normalised: bool | None = None
    steps: bool = False

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
        return frozenset(out | ({self.inner[0]} if self.inner else set()))


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ExpertKeys("block_sparse_moe", ("w1", "w3", "w2"), 8, 2, normalised=True)
QWEN3_MOE = ExpertKeys("mlp", _PROJECTIONS, 128, 8, inner=("moe_intermediate_size", 768), steps=True)
OLMOE = ExpertKeys("mlp", _PROJECTIONS, 64, 8)
PLACES = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE, "olmoe": OLMOE}
"""By `DecoderConfig.family`."""
