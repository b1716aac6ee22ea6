"""The contract of executors, on Ray; and what only a cluster can do to a sweep: a machine leaves it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from outrider.integrations.ray.executor import RayExecutor
from tests.evaluate.sweep_contract import ExecutorContract, Make
from tests.evaluate.sweep_work import WORK


@pytest.fixture
def make(ray: Any) -> Iterator[Make]:
    made: list[RayExecutor] = []

    def one() -> RayExecutor:
        made.append(RayExecutor(WORK))
        return made[-1]

    yield one
    for executor in made:
        executor.cancel_all()


class TestRay(ExecutorContract):
    pass
