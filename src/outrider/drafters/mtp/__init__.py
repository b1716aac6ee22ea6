"""MTP heads: a decoder layer on the target's last hidden state, which many checkpoints carry beside the model."""

from outrider.drafters.mtp.drafter import load
from outrider.drafters.mtp.format import carried
from outrider.drafters.mtp.network import MtpConfig, MtpHead, MtpNetwork

__all__ = ["MtpConfig", "MtpHead", "MtpNetwork", "carried", "load"]
