"""Which parts fit together: mismatches fail when the engine is built, and the error names the remedy (contract 8)."""

from __future__ import annotations

from outrider.errors import CapabilityError
from outrider.protocols import Drafter, Rule, Target


def check_fit(target: Target, drafter: Drafter, rule: Rule, allow_lossy: bool) -> None:
    """Raise CapabilityError for parts that do not fit together."""
    if drafter.trees and not target.trees:
        raise CapabilityError(
            f"drafter {drafter.name!r} proposes trees and this target cannot score them: use a chain (branching 1)"
        )
    if drafter.trees and not rule.trees:
        raise CapabilityError(
            f"rule {rule.name!r} verifies chains only and drafter {drafter.name!r} proposes trees: change one"
        )
    if getattr(drafter, "keyed", False) and getattr(rule, "reads_below", False):
        raise CapabilityError(
            f"drafter {drafter.name!r} draws with noise keyed by absolute place, and rule {rule.name!r} looks at drafts below "
            "the one it judges, which would not be exact: use speculative_sampling or match, or fresh noise (':fresh')"
        )
    if drafter.max_nodes and not target.rewinds:
        raise CapabilityError("this target cannot forget rejected tokens (recurrent state): use the drafter 'none'")
    if not rule.lossless and not allow_lossy:
        raise CapabilityError(
            f"rule {rule.name!r} changes the distribution of the text: set allow_lossy (--allow-lossy) to use it"
        )
