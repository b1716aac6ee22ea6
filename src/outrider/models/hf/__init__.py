"""Unmodified models of transformers as targets."""

from outrider.models.packages import require_transformers

require_transformers()  # otherwise every module here would end in a traceback of its own
