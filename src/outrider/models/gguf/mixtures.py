"""The keys of a GGUF file about its experts, as those of a `config.json`.

Keys: llama.cpp's `gguf-py/gguf/constants.py`. What some of them say is fixed by the architecture in its `src/models`; files whose
keys say otherwise are refused.
"""

from __future__ import annotations

from typing import Any

from outrider.config_keys import flag
from outrider.errors import ConfigError
from outrider.models.decoder import DecoderConfig
from outrider.models.expert_keys import GAIN, LIMIT, OLMOE, PLACES, QWEN2_MOE, QWEN3_MOE, ExpertKeys
from outrider.models.experts import MOST
from outrider.models.gguf.keys import Keys

UNDIVIDED = (OLMOE, QWEN2_MOE)
"""Whose weights of experts are not divided by their sum."""
DIVIDED_UNITS = (QWEN2_MOE, QWEN3_MOE)
"""Whose experts together are as wide as a dense layer where a file does not say how wide one is."""
_NONE, _SOFTMAX, _SOFTMAX_OF_USED = 0, 1, 3
"""ggml's numbers of the function that makes weights of a router's logits."""
MIXTURES = frozenset({
    "expert_count", "expert_used_count", "expert_feed_forward_length", "expert_gating_func", "expert_weights_norm",
    "expert_weights_scale", "expert_shared_count", "expert_group_count", "expert_group_used_count",
    "expert_shared_feed_forward_length",
})  # fmt: skip
"""Keys of every architecture, dense ones too: there they are 0."""


def is_mixture(keys: Keys) -> bool:
    """Whether the file says that it has experts. Raises ConfigError for a number that it cannot have."""
    return keys.whole("expert_count", 0, least=0, most=MOST) > 0


def mixture_of(keys: Keys, family: ExpertKeys, inner: int) -> dict[str, Any]:
    """What a `config.json` says of the experts. inner: units of a dense layer. Raises ConfigError for what is not read."""
    count, used = keys.whole("expert_count", most=MOST), keys.whole("expert_used_count", most=MOST)
    if used > count:
        raise ConfigError(
            f"{keys.path}: {keys.name('expert_used_count')} ({used}) exceeds {keys.name('expert_count')} ({count}): the file is "
            "damaged, download it again"
        )
    normalised = family not in UNDIVIDED
    _check(keys, normalised, family)
    units = keys.whole(
        "expert_feed_forward_length", max(inner // used, 1) if family in DIVIDED_UNITS else inner, most=1 << 20
    )
    out: dict[str, Any] = {"num_experts": count, "num_experts_per_tok": used}
    out |= {"intermediate_size": units} if family.inner is None else {family.inner[0]: units}
    if family.shared is not None:
        out[family.shared[0]] = keys.whole("expert_shared_feed_forward_length", inner, most=1 << 20)
    return out | ({"norm_topk_prob": normalised} if family.normalised is None else {})


def mixture_keys(c: DecoderConfig, where: object) -> dict[str, int]:
    """The keys of a model's experts, none for a dense one. Raises ConfigError for a mixture that GGUF has no words for."""
    e = c.experts
    if e is None:
        return {}
    normalised, bounds = PLACES[c.family] not in UNDIVIDED, (LIMIT, GAIN) if PLACES[c.family].bounded else (0.0, 1.0)
    cases = {
        f"weights of experts that are{' not' * normalised} divided by their sum": e.normalised is not normalised,
        "layers without experts": not all(e.sparse),
        "bounds of queries, keys and values": c.clip > 0,
        "experts with bounds of their own": (e.limit, e.gain) != bounds,
    }
    wrong = [what for what, found in cases.items() if found]
    if wrong:
        raise ConfigError(
            f"{where} has {wrong[0]}, for which GGUF has no key in its architecture: it cannot be written"
        )
    out = {"expert_count": e.count, "expert_used_count": e.used}
    out |= {"expert_feed_forward_length": e.inner} if PLACES[c.family].inner or PLACES[c.family].bounded else {}
    return out | ({"expert_shared_feed_forward_length": e.shared} if e.shared else {})


def _check(keys: Keys, normalised: bool, family: ExpertKeys) -> None:
    """Refuse values that would mean another mixture than the architecture's own."""
    bounded = family.bounded
    gating = keys.whole("expert_gating_func", _NONE, least=0)
    scale = keys.real("expert_weights_scale", 1.0, least=0.0)
    parts = {
        key: keys.whole(key, 0, least=0)
        for key in ("expert_shared_count", "expert_group_count", "expert_group_used_count")
    }
    most = {"expert_shared_count": int(family.shared is not None)}
    wrong = [key for key, value in parts.items() if value > most.get(key, 1)]
    if family.shared is None and keys.whole("expert_shared_feed_forward_length", 0, least=0):
        wrong.append("expert_shared_feed_forward_length")
    wrong += ["expert_gating_func"] if gating not in (_NONE, _SOFTMAX_OF_USED if bounded else _SOFTMAX) else []
    wrong += ["expert_weights_scale"] if scale not in (0.0, 1.0) else []  # 0: not scaled
    norm = flag(keys.values, keys.name("expert_weights_norm"), keys.path, normalised)
    wrong += ["expert_weights_norm"] if not bounded and norm is not normalised else []
    if wrong:
        value = keys.values[keys.name(wrong[0])]
        raise ConfigError(
            f"{keys.path} has {keys.name(wrong[0])} {value!r:.20}, a mixture that is not read: use another model"
        )
