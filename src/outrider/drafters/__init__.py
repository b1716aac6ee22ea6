"""Drafters: what proposes. A drafter is a file; it sees evidence and returns a draft, and nothing else crosses."""

from outrider.drafters.combine import FirstOf, first_of
from outrider.drafters.dflash import BlockDrafter
from outrider.drafters.eagle import Eagle
from outrider.drafters.early_exit import early_exit
from outrider.drafters.forced import Forced
from outrider.drafters.heads import Medusa
from outrider.drafters.load import load_drafter, parse_speculative_config
from outrider.drafters.model import ModelDrafter
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.drafters.prediction import Prediction

__all__ = [
    "BlockDrafter",
    "Eagle",
    "FirstOf",
    "Forced",
    "Medusa",
    "ModelDrafter",
    "NGram",
    "NoDraft",
    "Prediction",
    "early_exit",
    "first_of",
    "load_drafter",
    "parse_speculative_config",
]
