"""Drafters: what proposes. A drafter is a file; it sees evidence and returns a draft, and nothing else crosses."""

from outrider.drafters.combine import FirstOf, first_of
from outrider.drafters.eagle import Eagle
from outrider.drafters.heads import Medusa
from outrider.drafters.load import load_drafter, parse_speculative_config
from outrider.drafters.model import ModelDrafter
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.drafters.prediction import Prediction

__all__ = [
    "Eagle",
    "FirstOf",
    "Medusa",
    "ModelDrafter",
    "NGram",
    "NoDraft",
    "Prediction",
    "first_of",
    "load_drafter",
    "parse_speculative_config",
]
