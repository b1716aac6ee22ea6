"""Controllers: how deep each sequence may draft next."""

from outrider.control.adaptive import Adaptive
from outrider.control.fixed import Fixed

__all__ = ["Adaptive", "Fixed"]
