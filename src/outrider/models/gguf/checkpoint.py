"""A GGUF model as `models.checkpoint.Checkpoint` has a folder: read and checked, nothing allocated, then its weights.

The weights come in two forms: `packed`, as they are stored, in segments that each have a type; and `read`, their values in one
plain type, which is the twin of products with the packed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.errors import ConfigError
from outrider.models.config import Layout, Unsupported, layout_of, shapes_of
from outrider.models.decoder import DecoderConfig, DecoderWeights, LayerWeights, unpacked
from outrider.models.gguf import names
from outrider.models.gguf.config import FACTORS, architecture_of, config_of
from outrider.models.gguf.names import gguf_name
from outrider.models.gguf.weights import Weights
from outrider.models.places import refuse_extra
from outrider.models.rotary import halves, original_context
from outrider.nn.blocks import Segment
from outrider.nn.memory import require_memory, require_weights

Progress = Callable[[float], None]

EMBEDDING, HEAD, NORM = (gguf_name(name) for name in (names.EMBEDDING, names.HEAD, names.NORM))
DIVISORS = "rope_freqs.weight"
OLDER = ("blk.0.ffn_gate.0.weight", "blk.0.ffn_gate_up_exps.weight")
"""Names that tell of experts that lie each by itself (files of 2023), or with gates and ups in one tensor."""


class GgufCheckpoint:
    """path: a GGUF file, or any part of a split set. max_length: may shorten the context. Raises ConfigError."""

    def __init__(self, path: Path, *, max_length: int | None = None) -> None:
        self.weights = Weights(path)
        self._interleaved = architecture_of(self.weights).interleaved
        self.raw = config_of(self.weights)
        self._tensors = self.weights.tensors
        layout = self._layout(max_length)
        self.layout = replace(layout, decoder=replace(layout.decoder, inv_freq=self._frequencies(layout.decoder)))
        self._check()

    @property
    def config(self) -> DecoderConfig:
        return self.layout.decoder

    @property
    def parameters(self) -> int:
        """Numbers in the weights (a tied head counts once)."""
        return sum(self._tensors[name].numbers for name in self._expected())

    @property
    def blocks(self) -> bool:
        """Whether any of its weights are in blocks, whose products round their inputs."""
        return any(not self._tensors[name].block.plain for name in self._expected())

    @property
    def packed_bytes(self) -> int:
        """Bytes of `packed` weights in the native decoder: as they are stored, float32 where that type has no products."""
        found = (self._tensors[name] for name in self._expected())
        return sum(4 * tensor.numbers if tensor.block.widened else tensor.bytes for tensor in found)

    def notice(self, dtype: torch.dtype) -> tuple[str, ...]:
        """What a user should know of how the model is run, a sentence or none."""
        old = original_context(self.raw)
        if old is None or self.config.max_length >= self.raw["max_position_embeddings"]:
            return ()
        return (f"its context is {old} tokens here: beyond, every position is turned by other frequencies (LongRoPE)",)

    @property
    def layer_bytes(self) -> int:
        """Those of `packed_bytes` that are of blocks, not of embedding, norm and head."""
        rest = sum(self._tensors[name].bytes for name in {EMBEDDING, HEAD, NORM} & self._tensors.keys())
        return self.packed_bytes - rest

    def bytes_of(self, dtype: torch.dtype) -> tuple[int, int, int]:
        """`packed_bytes`, `layer_bytes`, and those of the latter that are of experts."""
        found = (self._tensors[name] for name in self._expected() if name.endswith("_exps.weight"))
        experts = sum(4 * tensor.numbers if tensor.block.widened else tensor.bytes for tensor in found)
        return self.packed_bytes, self.layer_bytes, experts

    def stored_bytes(self) -> Iterator[tuple[str, int]]:
        """Name of the type and bytes of every tensor."""
        return ((tensor.block.name, tensor.bytes) for tensor in self._tensors.values())

    def embedding(self) -> Segment:
        return self.weights.segment(EMBEDDING)

    def head(self) -> Segment | None:
        """The output head, None if it is the embedding."""
        return self.weights.segment(HEAD) if HEAD in self._tensors else None

    def norm(self) -> Float[Tensor, "H"]:
        return self.weights.numbers(NORM)

    def layer(self, i: int) -> LayerWeights:
        """Block i, its linears for later. Rows of queries and keys are in the order of halves, as in all of the lean runtime."""
        at, c, w, family = f"blk.{i}.", self.config, self.weights, self.layout.family
        heads = {"qkv": 0} if "qkv" in family.fused else {"q": c.heads, "k": c.kv_heads, "v": 0}
        numbers = lambda name: w.numbers(at + name) if at + name in self._tensors else None  # noqa: E731
        qkv = lambda: tuple(self._turned(w.segment(f"{at}attn_{part}.weight"), n) for part, n in heads.items())  # noqa: E731
        biases = [numbers(f"attn_{part}.bias") for part in heads]
        norms = {place: w.numbers(f"{at}{names.norm_name(place, family)}.weight") for place, _ in family.norms}
        return LayerWeights(
            norm1=norms.get("norm1"),
            qkv=qkv,
            qkv_bias=self._bias(biases, tuple(heads.values())) if self.layout.qkv_bias else None,
            q_norm=numbers("attn_q_norm.weight"),
            k_norm=numbers("attn_k_norm.weight"),
            o=lambda: (w.segment(at + "attn_output.weight"),),
            o_bias=numbers("attn_output.bias"),
            norm2=norms.get("norm2"),
            post1=norms.get("post1"),
            post2=norms.get("post2"),
            sinks=numbers(names.SINKS),
            **self._forward_part(at, c.experts is not None and c.experts.sparse[i]),
        )

    def _forward_part(self, at: str, sparse: bool) -> dict[str, Any]:
        """The weights of a block's feed-forward part, or of its experts. A router is plain: never multiplied in blocks."""
        parts, end = ["up"] if "gate_up" in self.layout.family.fused else ["gate", "up"], "_exps" if sparse else ""
        out: dict[str, Any] = {
            "gate_up": lambda: tuple(self.weights.segment(f"{at}ffn_{part}{end}.weight") for part in parts),
            "down": lambda: (self.weights.segment(f"{at}ffn_down{end}.weight"),),
            "router": self.weights.numbers(f"{at}ffn_gate_inp.weight") if sparse else None,
        }
        keys, shared = (
            self.layout.family.experts,
            sparse and self.config.experts is not None and self.config.experts.shared,
        )
        if shared:
            out |= {
                "shared_gate_up": lambda: tuple(
                    self.weights.segment(f"{at}ffn_{p}_shexp.weight") for p in ("gate", "up")
                ),
                "shared_down": lambda: (self.weights.segment(f"{at}ffn_down_shexp.weight"),),
                "shared_gate": self.weights.numbers(f"{at}ffn_gate_inp_shexp.weight")[None],
            }
        if sparse and keys is not None and keys.bounded:
            bias = lambda part: self.weights.numbers(f"{at}ffn_{part}.bias").flatten()  # noqa: E731
            out |= {"router_bias": bias("gate_inp"), "down_bias": bias("down_exps")}
            out |= {"gate_up_bias": torch.cat([bias("gate_exps"), bias("up_exps")])}
        return out

    def packed(
        self, dtype: torch.dtype, progress: Progress | None = None, role: str = "model", first: int | None = None
    ) -> DecoderWeights:
        """The weights as they are stored; linears are read one at a time, while they are used.

        dtype: of hidden states and the cache. first: only so many blocks.
        """
        note = f"choose a smaller {role}, or free memory"
        told, count = progress or (lambda _: None), first or self.config.layers
        needed = self.packed_bytes - self.layer_bytes * (self.config.layers - count) // self.config.layers
        require_memory(needed, torch.device("cpu"), f"the weights of the {role}", note)

        def layers() -> Iterator[LayerWeights]:
            for i in range(count):
                yield self.layer(i)
                told((i + 1) / count)

        embedding, head = (self.embedding(),), self.head()
        made = embedding if head is None else (head,)
        return DecoderWeights(embedding, layers(), self.norm(), made, dtype, self.config.wide_norms)

    def read(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
        role: str = "model",
    ) -> DecoderWeights:
        """The values of all weights, in `dtype` on `device`; CapacityError if they do not fit.

        role: the model's role in messages: "target", "draft".
        """
        where = torch.device(device)
        require_weights(self.parameters, dtype, where, role)
        return unpacked(self.packed(dtype, progress, role), where)

    def _turned(self, segment: Segment, heads: int) -> Segment:
        return replace(segment, rows=self._halves(segment.rows, heads)) if self._interleaved and heads else segment

    def _halves(self, rows: Tensor, heads: int) -> Tensor:
        return halves(rows, heads, self.config.head_dim, 2 * len(self.config.inv_freq))

    def _bias(self, parts: list[Tensor | None], heads: tuple[int, ...]) -> Tensor:
        found = [part for part in parts if part is not None]
        turned = [
            self._halves(part[:, None], n)[:, 0] if self._interleaved and n else part
            for part, n in zip(found, heads, strict=True)
        ]
        return torch.cat(turned)

    def _layout(self, max_length: int | None) -> Layout:
        short = original_context(self.raw)
        if max_length is None and short is not None:
            max_length = min(short, self.raw["max_position_embeddings"])
        try:
            layout = layout_of(self.raw, max_length, self.weights.path)
        except Unsupported as reason:
            raise ConfigError(f"the lean runtime cannot run {self.weights.path}: {reason}; use another model") from None
        first = lambda part: f"blk.0.{part}.bias" in self._tensors  # noqa: E731
        fused = "qkv" in layout.family.fused
        return replace(layout, qkv_bias=first("attn_qkv" if fused else "attn_q"), o_bias=first("attn_output"))

    def _frequencies(self, c: DecoderConfig) -> Float[Tensor, "half"]:
        """Rotary frequencies, divided by what the file gives for each (how it states Llama 3.1's scaling)."""
        if DIVISORS not in self._tensors:
            return c.inv_freq
        if self._tensors[DIVISORS].shape != c.inv_freq.shape:
            raise ConfigError(f"{self.weights.path}: {DIVISORS} has the shape {list(self._tensors[DIVISORS].shape)}, not "
                              f"{list(c.inv_freq.shape)}: the file is damaged, download it again")  # fmt: skip
        divisors = self.weights.numbers(DIVISORS)
        if not bool((divisors > 0).all()):
            raise ConfigError(f"{self.weights.path}: {DIVISORS} has numbers that are not positive: download it again")
        return c.inv_freq / divisors

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the decoder."""
        family = self.layout.family
        shapes = shapes_of(self.layout, HEAD in self._tensors, "stacked")
        return {gguf_name(name, family): shape for name, shape in shapes.items()}

    def _check(self) -> None:
        path, expected = self.weights.path, self._expected_or_fewer()
        other = next((name for name in OLDER if name in self._tensors), None)
        if other is not None and self.config.experts is not None:
            raise ConfigError(
                f"{path} holds its experts in another way than is read here ({other}): take a file with ffn_gate_exps, ffn_up_exps "
                "and ffn_down_exps, or convert the model again"
            )
        for name, shape in expected.items():
            tensor = self._tensors.get(name)
            if tensor is None:
                raise ConfigError(f"tensor {name} is missing from {path}: download the file again")
            if tensor.shape != shape:
                raise ConfigError(
                    f"tensor {name} of {path} has shape {list(tensor.shape)}, its keys say {list(shape)}: the file is damaged, "
                    "download it again"
                )
        refuse_extra(self._tensors.keys() - expected.keys() - {DIVISORS, *FACTORS.values()}, str(path))

    def _expected_or_fewer(self) -> dict[str, tuple[int, ...]]:
        """`_expected`, unless the keys speak of more layers than there are tensors: then nothing is made for each of them."""
        if self.config.layers > len(self._tensors):
            raise ConfigError(
                f"{self.weights.path} has {len(self._tensors)} tensors for {self.config.layers} layers: download it again"
            )
        return self._expected()
