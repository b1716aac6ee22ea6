"""Outrider on Ray: sweeps over a cluster (`executor`), and replicas of the server behind Ray Serve (`replicas`)."""

# pyright: reportMissingImports=false
# Ray is not among what the code is checked with: `make test-ray` has it.
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

    Raises ConfigError where there is no such cluster, or none can be started.
    """
    ray = the_ray()
    if ray.is_initialized():
        return ray
    given = {"address": address} if address else {"include_dashboard": False, "resources": {QUIET: 1}, **options}
    for left in reversed(range(1 if address else STARTS)):
        try:
            ray.init(log_to_driver=False, **given)
            return ray
        except Exception as error:  # plain ones too
            ray.shutdown()
            if not left:
                said = (str(error).strip().splitlines() or [type(error).__name__])[0]
                what = f"no Ray cluster at {address!r}" if address else "no Ray could be started here"
                raise ConfigError(f"{what} ({said}): `ray status` shows what runs") from None
    return ray


STARTS = 3
"""Times that Ray is started: it gives itself 30 s, which are too few on a busy machine."""
QUIET = "quiet"
"""The custom resource of machines on which seconds are measured: `ray start --resources '{"quiet": 1}'`."""
