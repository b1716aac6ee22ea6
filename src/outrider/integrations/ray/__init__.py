"""Outrider on Ray: sweeps over a cluster (`executor`), and replicas of the server behind Ray Serve (`replicas`)."""

from __future__ import annotations

import os
from typing import Any

from outrider.errors import ConfigError


def the_ray() -> Any:
    """The package `ray`. Raises ConfigError with the command that installs it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers of every start
    try:
        import ray
    except ImportError:
        raise ConfigError("this needs Ray: pip install 'outrider[ray]'") from None
    return ray


def connect(address: str | None, **options: Any) -> Any:
    """`ray`, connected to the cluster at `address`; None: to one that is started here and ends with this process.

    Raises ConfigError where there is no such cluster.
    """
    ray = the_ray()
    if ray.is_initialized():
        return ray
    try:
        if address is None:
            ray.init(include_dashboard=False, log_to_driver=False, resources={QUIET: 1}, **options)
        else:
            ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = str(error).strip().splitlines()
        raise ConfigError(
            f"no Ray cluster at {address!r} ({said[0] if said else type(error).__name__}): `ray status` shows it"
        ) from None
    return ray


QUIET = "quiet"
"""The custom resource of machines on which seconds are measured: `ray start --resources '{"quiet": 1}'`."""
