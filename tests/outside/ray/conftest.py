"""One Ray for the session: starting it takes seconds, or a minute on a busy machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src")])
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def ray() -> Iterator[Any]:
    """Ray on this machine with two CPUs, one of them a machine for seconds."""
    from outrider.integrations.ray import connect

    ray = connect(None, num_cpus=2)
    yield ray
    ray.shutdown()
