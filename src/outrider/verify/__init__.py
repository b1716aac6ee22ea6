"""Verification rules: pure functions of (p, draft, noise). One file per family, one name per rule; lossless by default."""

from __future__ import annotations

from outrider.verify.block import BlockVerification
from outrider.verify.lossy import Lossy
from outrider.verify.match import Match
from outrider.verify.multidraft import KSeq
from outrider.verify.registry import ALIASES, LOSSLESS, RULES, best_exact, load_rule, reads_codes
from outrider.verify.spechub import SpecHub
from outrider.verify.transport import OptimalTransport
from outrider.verify.traversal import Traversal
from outrider.verify.tree import SpeculativeSampling

__all__ = [
    "ALIASES",
    "LOSSLESS",
    "RULES",
    "BlockVerification",
    "KSeq",
    "Lossy",
    "Match",
    "OptimalTransport",
    "SpecHub",
    "SpeculativeSampling",
    "Traversal",
    "best_exact",
    "load_rule",
    "reads_codes",
]
