"""Packages beside ours that do not fit each other: said in one sentence with the remedy, before a library raises in its own way."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

from outrider.errors import ConfigError

REINSTALL = "pip install --force-reinstall --no-deps torchvision --index-url https://download.pytorch.org/whl/cpu"


def broken_torchvision() -> str:
    """What is wrong with an installed torchvision, and the remedy; "" if nothing is, or there is none.

    pip takes PyTorch and torchvision from different places if one was asked for from an index of its own; such a pair cannot be
    imported, and transformers imports torchvision wherever it is installed.
    """
    if find_spec("torchvision") is None:
        return ""
    try:
        import_module("torchvision")
    except Exception as error:  # a library of another build may fail in any way
        return (
            f"torchvision is of another build than PyTorch {version('torch')} ({_begin(error)}): install it from where PyTorch "
            f"came, as in {REINSTALL}"
        )
    return ""


@cache
def require_transformers() -> None:
    """Raise ConfigError if the models of transformers cannot be imported, with the reason that can be told."""
    try:
        import transformers

        assert transformers.PreTrainedModel
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        known = broken_torchvision()
        why = known or f"{_begin(cause)}: install it again, as in pip install --force-reinstall transformers"
        raise ConfigError(f"the models of transformers cannot be imported: {why}") from None


def _begin(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(". ")
