"""Drafters: what proposes. A drafter is a file; it sees evidence and returns a draft, and nothing else crosses."""

from outrider.drafters.combine import FirstOf, first_of
from outrider.drafters.dflash.drafter import BlockDrafter
from outrider.drafters.eagle.drafter import Eagle
from outrider.drafters.forced import Forced
from outrider.drafters.medusa.network import Medusa
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.model.early_exit import early_exit
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.drafters.prediction import Prediction
from outrider.drafters.registry import load_drafter, parse_speculative_config

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
