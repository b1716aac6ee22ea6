"""Medusa: heads on the target's last hidden state."""

from outrider.drafters.medusa.drafter import MedusaDrafter, load
from outrider.drafters.medusa.network import MedusaNetwork

__all__ = ["MedusaDrafter", "MedusaNetwork", "load"]
