"""Commands run in the process of the tests, as in the tests of evaluate."""

from tests.evaluate.conftest import run

__all__ = ["run"]
