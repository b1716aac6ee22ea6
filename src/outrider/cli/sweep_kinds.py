"""All kinds of cells that a plan may name, those of `evaluate` and of `train`, and what a worker calls."""

from __future__ import annotations

from typing import Any

WORK = "outrider.cli.sweep_kinds:perform"


def kinds() -> dict[str, Any]:
    """Name -> kind."""
    from outrider.cli.sweep_features import KIND
    from outrider.evaluate.sweep.kinds import KINDS

    return {**KINDS, KIND.name: KIND}


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """A job in a worker: see `evaluate.sweep.work.perform`."""
    from outrider.evaluate.sweep import work

    return work.perform(job, kinds())
