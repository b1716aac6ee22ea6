"""Medusa: heads on the target's last hidden state, side by side or one after the other."""

from outrider.drafters.medusa.drafter import MedusaDrafter, load
from outrider.drafters.medusa.network import MedusaNetwork
from outrider.drafters.medusa.sequential import SequentialNetwork
from outrider.drafters.medusa.sequential_drafter import SequentialDrafter

__all__ = ["MedusaDrafter", "MedusaNetwork", "SequentialDrafter", "SequentialNetwork", "load"]
