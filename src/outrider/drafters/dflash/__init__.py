"""DFlash: a whole block of tokens from one pass."""

from outrider.drafters.dflash.drafter import DFlashDrafter, load
from outrider.drafters.dflash.network import DFlashNetwork

__all__ = ["DFlashDrafter", "DFlashNetwork", "load"]
