"""`outrider plan --vllm --ray`: the first choice as vLLM and Ray Serve start it."""

from __future__ import annotations

from typing import Any

from outrider.errors import ConfigError


def check_options(asked: Any) -> None:
    """Raises ConfigError for a release of vLLM that is not known, before anything is measured."""
    from outrider.drafters.vllm_versions import version

    if asked.vllm is not None:
        version(asked.vllm)


def launch_document(
    choices: list[Any], models: dict[str, str], target: str | None, engine: Any, rule: str, asked: Any
) -> dict[str, Any]:
    """The command, the file and what is to be said of them. Lengths follow the planned batch sizes."""
    from pathlib import Path

    from outrider.drafters.vllm_versions import NEWEST
    from outrider.evaluate.planning import launch

    release = asked.vllm or NEWEST
    if target is None:
        raise ConfigError("this target is not a folder or a Hub name: vLLM cannot load it")
    config, note = launch.configuration(choices, models, target, release, rule)
    slots = max(c.batch for c in choices)
    serving = launch.Serving(target, config, release, slots=slots if slots > 1 else None)
    out = {"vllm": release, "config": config, "note": note, "command": launch.vllm_command(serving)}
    if asked.ray:
        name = Path(target).name if Path(target).is_dir() else target
        out["ray"] = launch.ray_text(launch.ray_document(serving, name, (1, asked.replicas or 1)), release)
    return out
