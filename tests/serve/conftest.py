"""One server for the tests that only ask it something."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.harness import Running, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running
