"""Controllers: how deep each sequence may draft next."""

from outrider.control.fixed import Fixed

__all__ = ["Fixed"]
