"""Controllers: they set the draft length of each sequence for the next step."""

from outrider.control.adaptive import Adaptive
from outrider.control.fixed import Fixed

__all__ = ["Adaptive", "Fixed"]
