"""A warning about a call of ours is an error; one that others' packages cause among themselves is not."""

from __future__ import annotations

import warnings
from types import ModuleType

import pytest

from tests.origins import is_ours

_LIBRARY = """
import warnings
def old(level):
    warnings.warn("old() goes away", DeprecationWarning, stacklevel=level)
def careless():
    old(2)
def very_careless():
    old(1)
def rough():
    warnings.warn("not exact", UserWarning)
"""


@pytest.fixture(scope="module")
def library() -> ModuleType:
    """A package of somebody else."""
    made = ModuleType("somebody.package")
    exec(compile(_LIBRARY, "somebody/package.py", "exec"), made.__dict__)
    return made


@pytest.mark.parametrize("level", [1, 2])
def test_a_deprecated_call_of_ours_is_an_error(library: ModuleType, level: int) -> None:
    with pytest.raises(DeprecationWarning, match="goes away"):
        library.old(level)
    with pytest.raises(UserWarning, match="not exact"):
        library.rough()


@pytest.mark.parametrize("call", ["careless", "very_careless"])
def test_what_others_do_among_themselves_is_only_shown(
    library: ModuleType, call: str, pytestconfig: pytest.Config
) -> None:
    if pytestconfig.getoption("pythonwarnings"):
        pytest.skip("the command line says what to do with every warning")
    with warnings.catch_warnings(record=True) as seen:  # the filters stay those of pyproject.toml
        getattr(library, call)()
    assert [str(w.message) for w in seen] == ["old() goes away"]


def test_what_is_expected_may_be_caught(library: ModuleType) -> None:
    with pytest.warns(DeprecationWarning, match="goes away") as seen:
        library.old(1)
    assert seen[0].filename == __file__


def test_names_are_told_apart() -> None:
    assert all(
        is_ours(name) for name in ("outrider", "outrider.engine.step", "tests.origins", "test_hf", "benchmarks.peers")
    )
    assert not any(is_ours(name) for name in ("transformers.cache_utils", "outriders", "torch", "", "testing"))
