"""Drafters: they propose tokens. A drafter is one file; it takes evidence and returns a draft, and exchanges nothing else."""

from outrider.drafters.combine import FirstOf, first_of
from outrider.drafters.dflash.drafter import DFlashDrafter
from outrider.drafters.eagle.drafter import EagleDrafter
from outrider.drafters.forced import Forced
from outrider.drafters.medusa.drafter import MedusaDrafter
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.model.early_exit import early_exit
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.drafters.prediction import PredictedOutput
from outrider.drafters.recycle import Recycle
from outrider.drafters.registry import load_drafter, parse_speculative_config
from outrider.drafters.suffix import Suffix
from outrider.moved import names_of

__all__ = [
    "DFlashDrafter",
    "EagleDrafter",
    "FirstOf",
    "Forced",
    "MedusaDrafter",
    "ModelDrafter",
    "NGram",
    "NoDraft",
    "PredictedOutput",
    "Recycle",
    "Suffix",
    "early_exit",
    "first_of",
    "load_drafter",
    "parse_speculative_config",
]

__getattr__ = names_of(__name__)
