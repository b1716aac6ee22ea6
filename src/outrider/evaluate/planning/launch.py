"""A plan as others start it: vLLM's `speculative_config` and command, and a file for Ray Serve. Nothing of either is imported.

Field names are checked against tables frozen from the released wheels: vLLM's in `drafters.vllm_versions`, Ray's here.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from outrider.drafters.vllm_versions import version
from outrider.errors import ConfigError, unknown_name
from outrider.evaluate.planning.plan import PlanEntry
from outrider.evaluate.planning.vllm_draft import drafter_config, schedule

RAY = "2.60"
_LLM_CONFIG = frozenset({
    "runtime_env", "model_loading_config", "llm_engine", "engine_kwargs", "accelerator_type", "accelerator_config",
    "placement_group_config", "lora_config", "deployment_config", "server_cls", "experimental_configs", "log_engine_metrics",
    "callback_config",
})  # fmt: skip
_AUTOSCALING = frozenset({
    "min_replicas", "initial_replicas", "max_replicas", "target_ongoing_requests", "metrics_interval_s", "look_back_period_s",
    "smoothing_factor", "upscale_smoothing_factor", "downscale_smoothing_factor", "upscaling_factor", "downscaling_factor",
    "downscale_delay_s", "downscale_to_zero_delay_s", "upscale_delay_s", "aggregation_function", "policy",
})  # fmt: skip
RAY_FIELDS: Mapping[tuple[str, ...], frozenset[str]] = {
    ("applications",): frozenset({"name", "route_prefix", "import_path", "args", "runtime_env", "deployments"}),
    ("applications", "args"): frozenset({"llm_configs", "ingress_cls_config", "ingress_deployment_config"}),
    ("applications", "args", "llm_configs"): _LLM_CONFIG,
    ("applications", "args", "llm_configs", "model_loading_config"): frozenset(
        {"model_id", "model_source", "tokenizer_source"}
    ),
    ("applications", "args", "llm_configs", "accelerator_config"): frozenset({"kind", "topology"}),
    ("applications", "args", "llm_configs", "placement_group_config"): frozenset(
        {"bundle_per_worker", "bundles", "strategy"}
    ),
    ("applications", "args", "llm_configs", "deployment_config"): frozenset(
        {
            "name", "num_replicas", "ray_actor_options", "max_ongoing_requests", "autoscaling_config", "max_queued_requests",
            "user_config", "health_check_period_s", "health_check_timeout_s", "graceful_shutdown_wait_loop_s",
            "graceful_shutdown_timeout_s", "logging_config", "request_router_config",
        }
    ),
    ("applications", "args", "llm_configs", "deployment_config", "autoscaling_config"): _AUTOSCALING,
}  # fmt: skip
"""Where in a Serve file -> the field names of ray 2.60 there (`ray.serve.llm`, `ray.serve.config`, `ray.serve.schema`)."""
RAY_GPUS = {"a100": "A100", "h100": "H100", "h200": "H200"}
"""Machines of `theory.hardware` -> Ray's `accelerator_type`."""


@dataclass(frozen=True, slots=True)
class Serving:
    """How a target is started. target: a folder or Hub name. config: vLLM's `speculative_config`, None for plain decoding.

    tensor, pipeline: GPUs that share a layer, and stages; accelerator: Ray's name of the GPU, None on CPU. slots: sequences
    decoded together. context: `--max-model-len`.
    """

    target: str
    config: Mapping[str, Any] | None
    release: str
    tensor: int = 1
    pipeline: int = 1
    accelerator: str | None = None
    slots: int | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        if self.config is not None:
            version(self.release).check(self.config)
        else:
            version(self.release)


def lengths_by_batch(choices: Sequence[PlanEntry], draft: str) -> dict[int, int]:
    """Batch size -> the fastest planned length of one drafter there, 0 where plain decoding is faster."""
    out: dict[int, int] = {}
    for c in sorted(choices, key=lambda c: -c.tokens_per_second):
        if c.plain or c.draft == draft:
            out.setdefault(c.batch, c.length)
    return dict(sorted(out.items()))


def configuration(
    choices: Sequence[PlanEntry], models: Mapping[str, str], target: str | None, release: str, rule: str = "auto"
) -> tuple[dict[str, Any] | None, str]:
    """The `speculative_config` of the best planned drafter that this release of vLLM has, and a sentence about it.

    The best: of the most tokens per second over all planned batch sizes, by the mean of logarithms. None: plain decoding.
    """
    sizes = sorted({c.batch for c in choices})
    known = {
        d: c for d in {c.draft for c in choices if not c.plain} if (c := drafter_config(d, models, target, release))
    }

    def worth(draft: str | None) -> float:
        speeds = [
            max(c.tokens_per_second for c in choices if c.batch == b and (c.plain or c.draft == draft)) for b in sizes
        ]
        return sum(map(math.log, speeds))

    best = max((None, *sorted(known)), key=worth)
    lengths = {} if best is None else lengths_by_batch(choices, best)
    missing = sorted({c.draft for c in choices if not c.plain} - set(known))
    said = f"vLLM {release} has no {', '.join(missing)}" if missing else ""
    if best is None or not any(lengths.values()):
        return None, "; ".join(
            x for x in ("nothing that vLLM has beats plain decoding here: start it plain", said) if x
        )
    config = {**known[best], "num_speculative_tokens": max(lengths.values())}
    if rule == "block" and config["method"] != "ngram":
        config["rejection_sample_method"] = "block"
    if len(set(lengths.values())) > 1:
        config["num_speculative_tokens_per_batch_size"] = schedule(lengths)
    version(release).check(config)
    return config, said


def vllm_command(serving: Serving) -> str:
    """The `vllm serve` command, quoted for a shell."""
    words = ["vllm", "serve", serving.target]
    for option, value in (
        ("--tensor-parallel-size", serving.tensor if serving.tensor > 1 else None),
        ("--pipeline-parallel-size", serving.pipeline if serving.pipeline > 1 else None),
        ("--max-num-seqs", serving.slots),
        ("--max-model-len", serving.context),
    ):
        words += [] if value is None else [option, str(value)]
    words += [] if serving.config is None else ["--speculative-config", json.dumps(serving.config)]
    return shlex.join(words)


def ray_document(serving: Serving, name: str, replicas: tuple[int, int] = (1, 1)) -> dict[str, Any]:
    """A Serve file for `ray.serve.llm` that starts the same on `replicas` (fewest, most). name: of the model, for clients.

    Raises ConfigError if a field name is not one of ray 2.60's.
    """
    low, high = replicas
    if not 1 <= low <= high:
        raise ConfigError(f"replicas are 1 <= fewest <= most, got {low} and {high}")
    engine: dict[str, Any] = {} if serving.config is None else {"speculative_config": dict(serving.config)}
    engine |= {"tensor_parallel_size": serving.tensor} if serving.tensor > 1 else {}
    engine |= {"pipeline_parallel_size": serving.pipeline} if serving.pipeline > 1 else {}
    engine |= {} if serving.slots is None else {"max_num_seqs": serving.slots}
    engine |= {} if serving.context is None else {"max_model_len": serving.context}
    scaling: dict[str, Any] = {"min_replicas": low, "max_replicas": high}
    scaling |= {} if serving.slots is None else {"target_ongoing_requests": serving.slots}
    deployment: dict[str, Any] = {"num_replicas": low} if low == high else {"autoscaling_config": scaling}
    deployment |= {} if serving.slots is None else {"max_ongoing_requests": 2 * serving.slots}
    config: dict[str, Any] = {
        "model_loading_config": {"model_id": name, "model_source": serving.target},
        "engine_kwargs": engine,
        "deployment_config": deployment,
    }
    if serving.accelerator is None:  # a bundle without GPU means CPU to Ray; a type must then be absent
        config["placement_group_config"] = {"bundle_per_worker": {"CPU": 1}}
    else:
        config["accelerator_type"] = serving.accelerator
    made = {
        "applications": [
            {
                "name": name,
                "route_prefix": "/",
                "import_path": "ray.serve.llm:build_openai_app",
                "args": {"llm_configs": [config]},
            }
        ]
    }
    check_ray(made)
    return made


def check_ray(document: Mapping[str, Any]) -> None:
    """Raises ConfigError for a field that ray 2.60 does not have, wherever a table is known."""

    def walk(value: Any, place: tuple[str, ...]) -> None:
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, Mapping):
                continue
            for key, inner in one.items():
                if place in RAY_FIELDS and key not in RAY_FIELDS[place]:
                    raise ConfigError(
                        f"ray {RAY}: {unknown_name(f'field of {place[-1]}', str(key), RAY_FIELDS[place])}"
                    )
                walk(inner, (*place, key))

    walk(dict(document), ())


def ray_text(document: Mapping[str, Any], release: str) -> str:
    """The Serve file as YAML, with how to start it and what it needs."""
    head = (
        f"# Ray Serve, ray {RAY}: serve run FILE.yaml\n"
        f"# For vLLM {release}. The extra ray[llm] of ray {RAY} installs vllm 0.29: install vLLM {release} beside ray[serve].\n"
    )
    return head + yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True, width=120)
