"""The keys of a GGUF model as a `config.json` in Hugging Face spelling: one reader of configurations serves both.

Keys: llama.cpp's `gguf-py/gguf/constants.py` and `conversion/`; what a file means without them: `load_arch_hparams` of its
`src/models/`. One thing is read otherwise: windows of Phi-3, which llama.cpp leaves out (and says so), are those that the model has
in its own format. A key of the model's architecture that is not known here is refused
by name, because ignoring it could change the text.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, replace
from typing import Any, Literal

from outrider.errors import ConfigError
from outrider.models.config import MOST_LAYERS
from outrider.models.families import FAMILIES, Family
from outrider.models.gguf.keys import Keys
from outrider.models.gguf.mixtures import MIXTURES, is_mixture, mixture_of
from outrider.models.gguf.weights import Weights


@dataclass(frozen=True, slots=True)
class Architecture:
    """How files of an architecture are read. family: model type in Hugging Face's spelling. named: its class there.

    interleaved: rows of queries and keys are stored as interleaved pairs. keys: what its files say beside `_PLAIN`. mixed: family
    and class of its files that have experts. windowless: what a file means that names no window, where layers of the family have
    one: "default" its usual window, "none" that no layer has one, "refused" nothing.
    """

    family: str
    named: str
    interleaved: bool = False
    keys: frozenset[str] = frozenset()
    mixed: tuple[str, str] | None = None
    windowless: Literal["default", "none", "refused"] = "default"


PATTERN, WINDOWED_BASE = "attention.sliding_window_pattern", "rope.freq_base_swa"
_WINDOWS = frozenset({PATTERN, WINDOWED_BASE})
"""Which layers have a window: every layer's yes or no, or of how many the last one has none; what these turn their heads by."""
_CAPS = frozenset({"final_logit_softcapping"})
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved=True, mixed=("mixtral", "MixtralForCausalLM")),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "qwen2moe": Architecture("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM"),
    "olmoe": Architecture("olmoe", "OlmoeForCausalLM"),
    "gpt-oss": Architecture("gpt_oss", "GptOssForCausalLM", keys=_WINDOWS, windowless="refused"),
    "gemma": Architecture("gemma", "GemmaForCausalLM"),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", keys=_CAPS | _WINDOWS | {"attn_logit_softcapping"}),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", keys=_CAPS | _WINDOWS, windowless="none"),
    "phi3": Architecture("phi3", "Phi3ForCausalLM"),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM"),
    "granite": Architecture(
        "granite", "GraniteForCausalLM", interleaved=True,
        keys=frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"}),
    ),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", interleaved=True),
    "glm4": Architecture("glm4", "Glm4ForCausalLM", interleaved=True),
}  # fmt: skip
"""The architectures that are read, by `general.architecture`."""
FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
"""Tensors of LongRoPE's divisors."""

_PLAIN = frozenset({
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "attention.causal", "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_log_multiplier", "vocab_size", "tensor_data_layout", "use_parallel_residual",
    "attention.sliding_window",
})  # fmt: skip
"""Keys of every architecture, behind its name."""


def architecture_of(weights: Weights) -> Architecture:
    """The row of the table. Raises ConfigError for a file that names none, or one that is not read."""
    name = weights.value("general.architecture")
    if weights.value("general.type", "model") != "model" or not isinstance(name, str):
        raise ConfigError(
            f"{weights.path} is no language model (general.type {reprlib.repr(weights.value('general.type'))}, architecture "
            f"{reprlib.repr(name)}): give the file of one"
        )
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"{weights.path} has the architecture {reprlib.repr(name)}, which is not read from GGUF yet (read are "
            f"{', '.join(ARCHITECTURES)}): give the folder in Hugging Face format that it was made from"
        )
    row, mixed = ARCHITECTURES[name], is_mixture(Keys(weights))
    if mixed and row.mixed is not None:
        return replace(row, family=row.mixed[0], named=row.mixed[1])
    if mixed and FAMILIES[row.family].experts is None:
        raise ConfigError(
            f"{weights.path} is a mixture of experts of the architecture {name}, which is not read from GGUF: use a dense model"
        )
    return row


def config_of(weights: Weights) -> dict[str, Any]:
    """A `config.json` for these files, as transformers would write it. Raises ConfigError for what is not known here."""
    kind = architecture_of(weights)
    keys = Keys(weights)
    keys.check(_PLAIN | kind.keys | MIXTURES)
    hidden, heads = keys.whole("embedding_length"), keys.same("attention.head_count")
    embedding = weights.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConfigError(
            f"{weights.path} has no tensor token_embd.weight (a vocabulary alone?): give the file of a model"
        )
    head_dim = keys.whole("attention.key_length", hidden // heads if heads else None)
    if keys.whole("attention.value_length", head_dim) != head_dim:
        raise ConfigError(
            f"{weights.path} has keys and values of different sizes, which are not read: use another model"
        )
    family, turned = FAMILIES[kind.family], keys.whole("rope.dimension_count", head_dim)
    if turned != head_dim and not family.partial:
        raise ConfigError(f"{weights.path} turns a part of every head only, which is not read yet: use another model")
    out: dict[str, Any] = {
        "model_type": kind.family,
        "architectures": [kind.named],
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": keys.whole("block_count", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.same("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": keys.same("feed_forward_length"),
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.real("rope.freq_base", 10000.0),
        "rope_scaling": _longrope(weights, keys) if family.longrope else _rope_scaling(keys, family),
        **({"partial_rotary_factor": turned / head_dim} if family.partial else {}),
        "tie_word_embeddings": "output.weight" not in weights.tensors,
        "dtype": _stored(weights),
    }
    if family.experts is not None:
        out |= mixture_of(keys, family.experts, out["intermediate_size"])
    out |= _window(keys, kind, out["num_hidden_layers"])
    out |= _factors(keys, kind, hidden // heads, head_dim, out["num_hidden_layers"])
    ends = [weights.value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return out | {"eos_token_id": [i for i in ends if isinstance(i, int)]}


def _stored(weights: Weights) -> str:
    """The type of its matrices if they are plain numbers, else float32: what codes stand for."""
    kinds = {tensor.block.name for tensor in weights.tensors.values() if len(tensor.shape) > 1}
    names = {"bf16": "bfloat16", "f16": "float16"}
    return names.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def _window(keys: Keys, kind: Architecture, layers: int) -> dict[str, Any]:
    """llama.cpp's reading of the windows of a file, see `Architecture.windowless`."""
    every = FAMILIES[kind.family].pattern
    order = _order(keys, every, layers) if keys.given(PATTERN) else {}
    if not keys.given("attention.sliding_window") and kind.windowless != "none":
        if kind.windowless == "refused":
            raise ConfigError(f"{keys.path} lacks {keys.name('attention.sliding_window')}: download it again")
        return order
    width = keys.whole("attention.sliding_window", 0, least=0)
    if not width and kind.windowless == "none":
        return {"sliding_window": None, "layer_types": ["full_attention"] * layers}
    if not width and not every:
        return {}
    if "sliding_window" in FAMILIES[kind.family].options:
        return {"sliding_window": width, **order}
    if kind.family == "llama":  # Mistral: the same network, and every layer has the window
        return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": width}
    raise ConfigError(f"{keys.path} has a sliding window of {width}, whose layers it does not name: use another model")


def _order(keys: Keys, usual: int, layers: int) -> dict[str, Any]:
    """The layers that have a window, where they are not those of the family. usual: of how many the family's last one has none."""
    given = keys.values[keys.name(PATTERN)]
    if isinstance(given, bool) or not isinstance(given, int | tuple | list):
        raise ConfigError(f"{keys.path}: {keys.name(PATTERN)} must be a number, or yes or no of every layer")
    if isinstance(given, int):
        windows = [given == 0 or i % given < given - 1 for i in range(layers)]
    else:
        windows = [bool(window) for window in given]
    if len(windows) != layers:
        raise ConfigError(
            f"{keys.path}: {keys.name(PATTERN)} is of {len(windows)} layers, not {layers}: download it again"
        )
    if windows == [i % usual < usual - 1 for i in range(layers)]:
        return {}
    return {"layer_types": ["sliding_attention" if window else "full_attention" for window in windows]}


def _factors(keys: Keys, kind: Architecture, share: int, head_dim: int, layers: int) -> dict[str, Any]:
    """The constants of some families. share: see `query_scalar`."""
    out: dict[str, Any] = {}
    if "query_pre_attn_scalar" in FAMILIES[kind.family].options:
        out["query_pre_attn_scalar"] = query_scalar(kind.family, layers, share, head_dim)
        out |= {"final_logit_softcapping": None, "attn_logit_softcapping": None}
    names = {
        "final_logit_softcapping": "final_logit_softcapping", "attn_logit_softcapping": "attn_logit_softcapping",
        **({WINDOWED_BASE: "rope_local_base_freq"} if _two_bases(kind) else {}), "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
    }  # fmt: skip
    given = {ours: keys.real(theirs) for theirs, ours in names.items() if theirs in kind.keys and keys.given(theirs)}
    if WINDOWED_BASE in kind.keys and not _two_bases(kind):
        base = keys.real("rope.freq_base", 10000.0)
        if (windowed := keys.real(WINDOWED_BASE, base)) != base:
            raise ConfigError(
                f"{keys.path} has {keys.name(WINDOWED_BASE)} {windowed:g} where all its layers turn by {base:g}: use another model"
            )
    if kind.family == "granite" and "attention_multiplier" not in given:
        given["attention_multiplier"] = head_dim**-0.5
    return out | given


def _two_bases(kind: Architecture) -> bool:
    """Whether layers with a window have a base of their own in the family."""
    return "rope_local_base_freq" in FAMILIES[kind.family].options


_LARGEST = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the models of 27 billion parameters."""


def query_scalar(family: str, layers: int, share: int, head_dim: int) -> int:
    """`query_pre_attn_scalar`, for which GGUF has no key: a head's size, but for the largest Gemmas, which llama.cpp knows by their
    number of layers, share: hidden size by heads."""
    return share if layers == _LARGEST[family] else head_dim


def _longrope(weights: Weights, keys: Keys) -> dict[str, Any] | None:
    """LongRoPE's divisors, which lie in tensors; the longer ones too, though only the short are used."""
    found = [weights.tensors.get(name) for name in FACTORS.values()]
    if not all(found):
        return _rope_scaling(keys, FAMILIES["phi3"])
    if any(tensor is not None and (len(tensor.shape) != 1 or tensor.shape[0] > 2048) for tensor in found):
        raise ConfigError(f"{keys.path} has LongRoPE's divisors in another shape than a list: download it again")
    out: dict[str, Any] = {name: weights.numbers(tensor).tolist() for name, tensor in FACTORS.items()}
    out |= {
        "rope_type": "longrope",
        "original_max_position_embeddings": keys.whole("rope.scaling.original_context_length"),
    }
    if keys.given("rope.scaling.attn_factor"):
        out["attention_factor"] = keys.real("rope.scaling.attn_factor", most=1e6)
    return out


def _rope_scaling(keys: Keys, family: Family) -> dict[str, Any] | None:
    kind = keys.values.get(keys.name("rope.scaling.type"), "none")
    if kind == "none":
        old = keys.real("rope.scale_linear", 1.0)
        plain = {"rope_type": "default"} if family.scaled else None  # said, where there is no default
        return plain if old == 1.0 else {"rope_type": "linear", "factor": old}
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.real("rope.scaling.factor", most=1e6)}
    if kind != "yarn":
        raise ConfigError(
            f"{keys.path} scales its positions by {reprlib.repr(kind)}, which is not read: use another model"
        )
    if keys.real("rope.scaling.yarn_ext_factor", 1.0, most=1e6) != 1.0 or keys.given(
        "rope.scaling.yarn_log_multiplier"
    ):
        raise ConfigError(
            f"{keys.path} has a kind of YaRN that is not read (ext_factor, log_multiplier): use another model"
        )
    out: dict[str, Any] = {"rope_type": "yarn", "factor": keys.real("rope.scaling.factor", most=1e6)}
    out["original_max_position_embeddings"] = keys.whole("rope.scaling.original_context_length")
    out |= {"truncate": False} if family.scaled else {}  # gpt-oss's own configuration, for which GGUF has no key
    for ours, theirs in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if keys.given(f"rope.scaling.{ours}"):
            out[theirs] = keys.real(f"rope.scaling.{ours}", most=1e6)
    for name in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        if keys.given(name) and keys.real(name, most=1e6) != 1.0:
            raise ConfigError(f"{keys.path} has {keys.name(name)} other than 1, which is not read: use another model")
    return out
