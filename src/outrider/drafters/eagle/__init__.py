"""EAGLE: a decoder layer on the target's hidden states that drafts token by token."""

from outrider.drafters.eagle.drafter import EagleDrafter, load
from outrider.drafters.eagle.eagle1 import Eagle1Network
from outrider.drafters.eagle.eagle3 import Eagle3Network

__all__ = ["Eagle1Network", "Eagle3Network", "EagleDrafter", "load"]
