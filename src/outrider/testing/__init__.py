"""Checks for drafters and rules of your own: the contracts of `docs/step.md`, one sentence for the first that is broken.

>>> from outrider.drafters.ngram import NGram
>>> from outrider.testing import check_drafter
>>> check_drafter(lambda: NGram(3)).name
'ngram'
"""

from outrider.testing.drafters import check_drafter
from outrider.testing.report import BrokenContract, Report
from outrider.testing.rules import check_rule

__all__ = ["BrokenContract", "Report", "check_drafter", "check_rule"]
