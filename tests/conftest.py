"""Strict numerics for every test: one thread, deterministic kernels, no network."""

from __future__ import annotations

import gc
import os
import signal
import threading

os.environ.setdefault("OMP_PROC_BIND", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import warnings

import pytest
from hypothesis import settings

import outrider  # noqa: F401  (before torch, which OUTRIDER_ISA may hold to fewer instructions)
from tests.origins import warn_about_caller

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """Not where workers run the tests and this process only hands them out: it does without torch, which takes seconds.

    What a shell runs in its background ignores Ctrl-C, and so would every command that a test starts and interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not config.getoption("numprocesses", None):
        import torch

        # as use_deterministic_algorithms, which imports torch's compiler: two seconds
        torch.set_deterministic_debug_mode("error")


def pytest_collection_finish() -> None:
    """Modules and collected tests are never garbage, and there are millions of objects in them: none is looked at again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _what_is_frozen_stays_so():
    """A server freezes the objects of its process when it begins and thaws all of them when it ends. Here it is not alone in its
    process: every collection after it, one for each server that begins, would look at those millions again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _warnings_name_who_caused_them():
    from torch.jit._builtins import _register_builtin

    _register_builtin(
        warn_about_caller, "aten::warn"
    )  # as warnings.warn is: older releases of transformers script models
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "warn", warn_about_caller)
        yield
