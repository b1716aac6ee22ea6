"""What the stages of `pycode.py` share: the configuration, models of its shapes, their loss, and what a stage has left."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from outrider.train import data, losses
from outrider.train.checkpoint import load_latest
from outrider.train.loop import LoopConfig

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Shape:
    """A Llama: sizes in units of features, heads and layers."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int


@dataclass(frozen=True)
class Config:
    """The whole recipe. Batches are ``rows`` windows of ``length`` tokens."""

    work: Path = HERE.parent / "runs" / "pycode"
    assets: Path = HERE.parent / "src" / "outrider" / "assets" / "pycode"
    source: Path = Path(sysconfig.get_paths()["stdlib"])
    baseline: Path | None = None  # an older pair (folders target/ and draft/) to compare with
    grow_from: Path | None = None  # a ready seed model and its tokenizer, instead of training them
    draft_from: Path | None = None  # a ready draft to distil, instead of training one from nothing
    vocabulary: int = 4096
    context: int = 1024
    length: int = 512
    rows: int = 4
    draft_rows: int = 8
    label_windows: int = 1024  # asked of the target; 4 MB each on disk
    evaluated_windows: int = 96
    evaluated_length: int = 256  # a seed or baseline may have been trained on no more
    seed: int = 0
    small: Shape = Shape(hidden=288, layers=7, heads=6, kv_heads=6, head_dim=48, intermediate=768)
    growth: int = 3  # 21 layers, 22.1M parameters, 44 MB in bf16: more than the last-level cache holds
    draft: Shape = Shape(hidden=160, layers=2, heads=5, kv_heads=5, head_dim=32, intermediate=432)
    seed_loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=4000, lr=2e-3))
    target_loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=1200, lr=1.2e-3, warmup=60, final_lr_ratio=0.02)
    )
    draft_ce_loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=3000, lr=4e-3, warmup=60))
    draft_loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=1200, lr=2e-3, warmup=20, final_lr_ratio=0.02)
    )


def load_stream(config: Config, name: str) -> np.ndarray:
    """Token ids of ``training`` or ``held_out``, ``[N] uint16``."""
    return np.load(config.work / f"{name}.npy", allow_pickle=False)


def build_model(shape: Shape, config: Config) -> torch.nn.Module:
    """A LlamaForCausalLM with fresh float32 weights, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate,
            max_position_embeddings=config.context,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation="sdpa",
        )
    )


def logits_of(model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """``[rows, length, V]`` logits of the next token for ids ``[rows, length]``."""
    return model(input_ids=inputs, use_cache=False).logits


def next_token_loss(model: torch.nn.Module, batch: torch.Tensor, progress: float) -> torch.Tensor:
    """Cross-entropy of every next token in ``batch [rows, length + 1]``; ``progress`` is not used."""
    return losses.cross_entropy(logits_of(model, batch[:, :-1]), batch[:, 1:])


def held_out_loss(config: Config, limit: int = 32) -> Callable[[torch.nn.Module], dict[str, float]]:
    """An ``evaluate`` for the loop: mean nats per token on ``limit`` windows spread over the held-out files."""
    batch = data.windows(load_stream(config, "held_out"), config.length, limit)

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        parts = [next_token_loss(model, rows, 0.0).item() for rows in batch.split(8)]
        return {"held_out_nats": sum(parts) / len(parts)}

    return evaluate


def trained(shape: Shape, stage: str, config: Config) -> torch.nn.Module:
    """The model that ``stage`` left in the work folder, float32, in evaluation mode."""
    checkpoint = load_latest(config.work / stage)
    if checkpoint is None:
        raise SystemExit(f"nothing in {config.work / stage}: run the stage {stage!r} first")
    model = build_model(shape, config)
    model.load_state_dict(checkpoint.tensors["model"])
    return model.eval()
