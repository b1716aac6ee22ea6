"""Old addresses lead to what is at the new ones, with a warning, and a wrong one is as wrong as ever."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from outrider import moved


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds an alias that another one has imported."""
    for old in moved.MODULES:
        monkeypatch.delitem(sys.modules, old, raising=False)


@pytest.mark.filterwarnings("ignore:outrider.target is now:DeprecationWarning")  # of the package that it was in
@pytest.mark.parametrize(("old", "new"), moved.MODULES.items())
def test_an_old_module_is_the_new_one(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new};"):
        alias = import_module(old)
    for name, thing in vars(import_module(new)).items():
        if not name.startswith("_"):
            assert getattr(alias, name) is thing


@pytest.mark.parametrize(("old", "new"), moved.NAMES.items())
def test_an_old_name_is_the_new_one(old: str, new: str) -> None:
    module, name = old.split(":")
    home, new_name = new.split(":")
    assert name not in vars(import_module(module)), "a row for a name that is still there"
    with pytest.warns(DeprecationWarning, match=f"{module}.{name} is now {home}.{new_name};"):
        assert moved.find(module, name) is getattr(import_module(home), new_name)


def test_names_that_left_their_module_are_found_by_its_old_address() -> None:
    from outrider import Engine

    with pytest.warns(DeprecationWarning, match="is now"):
        from outrider.engine.engine import Engine as old  # type: ignore[import-not-found]
    assert old is Engine


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        import_module("outrider.engine.never")
    with pytest.warns(DeprecationWarning, match="is now"), pytest.raises(ImportError):
        from outrider.engine.engine import never  # type: ignore[import-not-found] # noqa: F401


@pytest.mark.parametrize("name", ["Counts", "PHASES", "StepRecord"])
def test_what_left_the_nouns_is_found_there(name: str) -> None:
    import outrider.records
    import outrider.types

    with pytest.warns(DeprecationWarning, match=f"outrider.types.{name} is now outrider.records.{name};"):
        assert getattr(outrider.types, name) is getattr(outrider.records, name)
