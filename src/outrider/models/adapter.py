"""LoRA folders as PEFT writes them: what they add to the weights of a base model, merged while those are read.

A folder is an adapter if it has an adapter_config.json and no config.json. Merging is W + scale * B A, in float32. Whatever of an
adapter is not such a sum is refused by its name: without it, it would be another model. (Hu et al. 2021, arXiv 2106.09685)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from outrider.config_keys import flag, real
from outrider.errors import ConfigError
from outrider.files import read_json
from outrider.models.folder import resolve_folder
from outrider.models.gguf.parts import is_gguf

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CONFIG_BYTES = 4 << 20
_READ = frozenset({
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "bias",
    "init_lora_weights", "fan_in_fan_out",
})  # fmt: skip
_NO_EFFECT = frozenset({
    "auto_mapping", "inference_mode", "task_type", "revision", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "lora_dropout", "peft_version", "megatron_core", "megatron_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying", "lora_ga_config", "eva_config", "corda_config",
})  # fmt: skip
"""Keys that say how an adapter was trained, or where; where it is says the file of its tensors."""
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", None)
"""Values of init_lora_weights that leave the base model as it is."""
_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True, slots=True)
class Adapter:
    """base: the place of the model it belongs to. pairs: module -> the names of its A and B. scales: module -> factor of B A."""

    folder: Path
    base: Path
    pairs: dict[str, dict[str, str]]
    shapes: dict[str, tuple[int, ...]]
    scales: dict[str, float]

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise ConfigError unless every pair belongs to a weight of these shapes."""
        for module, pair in self.pairs.items():
            shape = expected.get(f"{module}.weight", ())
            found = (self.shapes[pair["B"]][:1] + self.shapes[pair["A"]][1:]) if len(pair) == 2 else ()
            if len(shape) != 2 or found != shape or self.shapes[pair["A"]][0] != self.shapes[pair["B"]][1]:
                raise ConfigError(
                    f"{self.folder} adds to {module[:120]}, which {self.base} has not in that shape: it belongs to another model"
                )

    def added(self, name: str, weight: Tensor) -> Tensor:
        """A weight with what the adapter adds to it, in float32; the weight itself if it adds nothing."""
        module = name.removesuffix(".weight")
        if module not in self.pairs:
            return weight
        pair = self.pairs[module]
        with _open(self.folder) as tensors:
            a, b = tensors.get_tensor(pair["A"]).float(), tensors.get_tensor(pair["B"]).float()
        out = weight.float() + self.scales[module] * (b @ a)
        if not bool(out.isfinite().all()):
            raise ConfigError(
                f"{self.folder} adds numbers to {name} that are not finite: it is damaged, download it again"
            )
        return out


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter, not a model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def home_of(place: Path, file: str = "config.json") -> Path:
    """Where a model's files lie: the base of an adapter, unless the adapter's folder has this file itself."""
    return base_of(place) if is_adapter(place) and not (place / file).is_file() else place


def base_of(folder: Path) -> Path:
    """The place of an adapter's base model. Raises ConfigError for a name that leads nowhere, or to no model."""
    name = read_json(folder / CONFIG, _CONFIG_BYTES).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{folder / CONFIG} names no base model of this LoRA adapter: write its folder into base_model_name_or_path"
        )
    beside = folder / name
    base = beside if beside.is_dir() else resolve_folder(name)
    if is_gguf(base) or is_adapter(base) or not (base / "config.json").is_file():
        raise ConfigError(
            f"{folder} is an adapter of {base}, which is no folder in Hugging Face format: write the folder of its base model into "
            f"base_model_name_or_path of {CONFIG}"
        )
    return base


def read_adapter(folder: Path) -> Adapter | None:
    """The adapter of a folder, None if it is none. Raises ConfigError for one that cannot be merged."""
    if not is_adapter(folder):
        return None
    raw = read_json(folder / CONFIG, _CONFIG_BYTES)
    _refuse(folder, raw)
    shapes = _shapes(folder)
    pairs: dict[str, dict[str, str]] = {}
    for name in shapes:
        found = _NAME.fullmatch(name)
        if found is None:
            raise ConfigError(
                f"{folder} has the tensor {name[:120]}, which is no part of a sum: merge it with peft (merge_and_unload)"
            )
        pairs.setdefault(found["module"], {})[found["side"]] = name
    if any(len(pair) < 2 for pair in pairs.values()) or not pairs:
        raise ConfigError(f"{folder} lacks one side of a pair of tensors (lora_A, lora_B): download it again")
    scales = {module: _scale(raw, module, shapes[pair["A"]][0]) for module, pair in pairs.items()}
    return Adapter(folder, base_of(folder), pairs, shapes, scales)


def _refuse(folder: Path, raw: dict[str, Any]) -> None:
    said = sorted(key for key, value in raw.items() if value and key not in _READ | _NO_EFFECT)
    wrong = said[0] if said else None
    if raw.get("peft_type") != "LORA":
        wrong = f"peft_type {str(raw.get('peft_type'))[:40]}"
    elif raw.get("bias", "none") != "none":
        wrong = "bias"
    elif flag(raw, "fan_in_fan_out", folder / CONFIG):
        wrong = "fan_in_fan_out"
    elif raw.get("init_lora_weights", True) not in _PLAIN_STARTS:
        wrong = f"init_lora_weights {str(raw['init_lora_weights'])[:40]}, which changes the base model"
    if wrong:
        raise ConfigError(
            f"{folder} is no LoRA adapter that can be merged here ({wrong[:120]}): merge it with peft (merge_and_unload)"
        )


def _scale(raw: dict[str, Any], module: str, rank: int) -> float:
    where = CONFIG
    patterns = raw.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", str(key)) for key in patterns):
        raise ConfigError(
            f"{where}: alpha_pattern must name modules, without wildcards: merge it with peft (merge_and_unload)"
        )
    own = [key for key in patterns if module == key or module.endswith(f".{key}")]
    alpha = real(patterns, own[0], where, most=1e6) if own else real(raw, "lora_alpha", where, 8.0, most=1e6)
    return alpha / (math.sqrt(rank) if flag(raw, "use_rslora", where) else rank)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    with _open(folder) as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        if len(shape) != 2 or not all(shape):
            raise ConfigError(
                f"{folder} has the tensor {name[:120]} of shape {list(shape)}: it is no part of a sum, merge it with peft"
            )
    return shapes


def _open(folder: Path) -> Any:
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = any(any(folder.glob(pattern)) for pattern in ("*.bin", "*.pt"))
        more = (
            "; pickled weights can run code: save them with peft as safetensors" if pickled else ": download it again"
        )
        raise ConfigError(f"{folder} has no {WEIGHTS}{more}")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is damaged ({str(error)[:120]}): download it again") from None
