"""EAGLE-3: a drafter whose features are several hidden states of the target, fused.

Li et al. 2025 (EAGLE-3, arXiv 2503.01840, section 3.1): three taps of the target are fused by `fc`; the layer reads the normed
token and the normed feature, concatenated; its output goes through its own norm and head, over all tokens or a subset.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from outrider.config_keys import flag, whole
from outrider.drafters.checkpoint import (
    SPECULATORS_VERSION,
    check_fits,
    fill,
    read_folder,
    speculators_config,
    write_folder,
)
from outrider.drafters.config_keys import (
    LAYER,
    SPECULATORS,
    check_keys,
    check_layers,
    layer_ids,
    layer_keys,
    layer_shape,
)
from outrider.drafters.eagle.network import Attention, EagleConfig, EagleNetwork
from outrider.drafters.target_tables import embeddings
from outrider.drafters.vocabulary import from_offsets, spread, to_offsets
from outrider.errors import ConfigError
from outrider.nn.drafts import Features, Join
from outrider.nn.layers import Mlp
from outrider.protocols import Target

TAPS = "eagle_aux_hidden_state_layer_ids"
READ = (
    frozenset({TAPS, "eagle_config", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"}) | SPECULATORS
)
"""Top-level keys of a folder in the `speculators` layout; EAGLE's own folders have the keys of the layer there as well."""


class _Layer(nn.Module):
    def __init__(self, c: EagleConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden, c.eps)
        self.hidden_norm = nn.RMSNorm(c.hidden, c.eps)
        self.self_attn = Attention(c, 2 * c.hidden)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden, c.eps)
        self.mlp = Mlp(c.hidden, c.inner)


class Eagle3Network(EagleNetwork):
    """The network; tensors are named as in the `speculators` layout of EAGLE-3.

    support: [S] target tokens of the head's columns if the draft vocabulary is a subset of the target's, else None.
    """

    def __init__(self, config: EagleConfig, support: Int[Tensor, "S"] | None = None) -> None:
        super().__init__(config)
        c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden)
        self.fc = nn.Linear(len(c.taps) * c.target_hidden, c.hidden, bias=False)
        self.layers = nn.ModuleList([_Layer(c)])
        self.norm = nn.RMSNorm(c.hidden, c.eps)
        self.lm_head = nn.Linear(c.hidden, c.draft_vocab or c.vocab_size, bias=False)
        self.support: Tensor | None
        self.register_buffer("support", support, persistent=False)  # a folder holds it as offsets

    def read(self, taps: Float[Tensor, "*n K H"]) -> Float[Tensor, "*n D"]:
        """Taps fused by `fc`."""
        return self.fc(taps.flatten(-2))

    def rows(self, token: Int[Tensor, "*n"]) -> Float[Tensor, "*n D"]:
        """Normed embeddings."""
        return self._layer.input_layernorm(self.embed_tokens(token))

    def join(self, row: Float[Tensor, "*n D"], g: Float[Tensor, "*n D"]) -> tuple[Tensor, Tensor]:
        """Normed token and normed feature, concatenated; the residual is the feature."""
        normed = self._layer.hidden_norm(g)
        return (normed if self.config.norm_before_residual else g), torch.cat([row, normed], -1)

    def logits(self, state: Float[Tensor, "*n D"]) -> Float[Tensor, "*n V"]:
        """Logits over the target's vocabulary; minus infinity for tokens that are not drafted."""
        return spread(self.lm_head(self.norm(state)), self.support, self.config.vocab_size)

    @property
    def features(self) -> Features:
        c, layer = self.config, self._layer
        return Features(
            len(c.taps), c.target_hidden, Join.BESIDE, self.fc.weight, token_norm=layer.input_layernorm.weight,
            feature_norm=layer.hidden_norm.weight, normed_residual=c.norm_before_residual,
        )  # fmt: skip

    @property
    def output(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        return self.norm.weight, self.lm_head.weight, self.support

    # ------------------------------------------------------------------ folders
    def save(self, folder: Path, verifier: str = "") -> None:
        """Write the `speculators` layout (bfloat16). verifier: name or path of the target, for programs that load it too."""
        c = self.config
        shape = {
            "model_type": "llama",
            **layer_keys(c, 1),
            "attention_bias": False,
            "mlp_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
            "tie_word_embeddings": False,
        }
        write_folder(
            folder,
            {
                "architectures": ["Eagle3DraftModel"],
                "speculators_model_type": "eagle3",
                "speculators_version": SPECULATORS_VERSION,
                "draft_vocab_size": c.draft_vocab or c.vocab_size,
                "target_hidden_size": c.target_hidden,
                "norm_before_residual": c.norm_before_residual,
                "norm_before_fc": False,
                "eagle_aux_hidden_state_layer_ids": list(c.taps),
                "tie_word_embeddings": False,
                "dtype": "bfloat16",
                "speculators_config": speculators_config("eagle3", 3, verifier),
                "transformer_layer_config": shape,
            },
            # d2t and t2d: the package knows them only for reduced vocabularies
            {name: value.bfloat16() for name, value in self.state_dict().items()}
            | ({} if self.support is None else to_offsets(self.support, c.vocab_size)),
        )

    @classmethod
    def load(cls, folder: Path, target: Target) -> Eagle3Network:
        """The drafter in a folder, for `target`; raises ConfigError for another kind of folder or unsupported settings."""
        config, tensors = read_folder(folder, "eagle3")
        made = _read_config(config, folder, target)
        check_fits(folder, target, hidden=made.target_hidden, vocab_size=made.vocab_size, layers=made.taps)
        size = made.draft_vocab or made.vocab_size
        support = from_offsets(tensors.pop("d2t", None), size, made.vocab_size, folder)
        tensors.pop("t2d", None)
        tensors = {n.replace("midlayer.", "layers.0."): t for n, t in tensors.items()}
        if "embed_tokens.weight" not in tensors and made.hidden == target.hidden_size:  # EAGLE's own files leave it out
            tensors["embed_tokens.weight"] = embeddings(target).cpu()
        with torch.device("meta"):
            model = cls(made)
        model.support = support
        return fill(model, tensors, folder)


def _read_config(config: dict[str, Any], folder: Path, target: Target) -> EagleConfig:
    shape = config.get("transformer_layer_config", config)  # EAGLE's own folders describe the layer at the top
    if not isinstance(shape, dict) or shape.get("num_hidden_layers", 1) != 1:
        raise ConfigError(f"{folder}: transformer_layer_config must describe one layer")
    flat = shape is config
    check_keys(config, READ | LAYER if flat else READ, folder)
    check_keys(shape, READ | LAYER if flat else LAYER, folder)
    check_layers({**shape, "model_type": "llama"} if flat else shape, folder, "llama")
    if config.get("norm_before_fc") or config.get("fc_norm") or config.get("norm_output"):
        raise ConfigError(f"{folder}: norm_before_fc, fc_norm and norm_output are not supported")
    made = layer_shape(shape, folder)
    hidden, vocab_size = made["hidden"], made["vocab_size"]
    size = whole(config, "draft_vocab_size", folder, default=vocab_size)
    own = config.get("target_hidden_size")
    return EagleConfig(
        **made,
        target_hidden=whole(config, "target_hidden_size", folder) if own else hidden,
        taps=_taps(config, folder, target),
        norm_before_residual=flag(config, "norm_before_residual", folder),
        draft_vocab=0 if size == vocab_size else size,
    )


def _taps(config: dict[str, Any], folder: Path, target: Target) -> tuple[int, ...]:
    """The target's layers that `fc` reads: at the top level, or in `eagle_config`, where some trainers write them."""
    nested = config.get("eagle_config")
    nested = {} if nested is None else nested
    if not isinstance(nested, dict) or nested.keys() - {TAPS, "use_aux_hidden_state"}:
        raise ConfigError(f"{folder}: eagle_config may name {TAPS} and use_aux_hidden_state only")
    if not flag(nested, "use_aux_hidden_state", folder, True):
        raise ConfigError(
            f"{folder}: use_aux_hidden_state = false is not supported: use a drafter that reads three layers"
        )
    place = config if config.get(TAPS) is not None else nested
    return layer_ids(place, TAPS, folder, [2, target.layers // 2, target.layers - 3])
