"""Sampling parameters of a request that drafts with some of the loaded drafters only."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import no_type_check

from outrider.params import SamplingParams


@no_type_check  # as its base
@dataclass(frozen=True, slots=True)
class Chosen(SamplingParams):
    """drafters: numbers of the parts of a `drafters.gated.Gated` drafter that may propose for this request; None: all of them."""

    drafters: tuple[int, ...] | None = None

    @staticmethod
    def of(params: SamplingParams, drafters: tuple[int, ...]) -> Chosen:
        """The same parameters with this choice."""
        return Chosen(**{f.name: getattr(params, f.name) for f in fields(SamplingParams)}, drafters=drafters)
