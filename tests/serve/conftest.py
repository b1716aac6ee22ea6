"""One server for the tests that only ask it something."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.serve.harness import Running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    from tests.serve.harness import serving  # here: a process that only hands tests out reads this file too

    with serving() as running:
        yield running
