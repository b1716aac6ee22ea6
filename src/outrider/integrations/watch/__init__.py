"""Watching a server from outside, whatever engine it runs: our own, vLLM, SGLang or llama.cpp.

    page        a page of metrics, read within a size and a time
    readers     which metric of which engine is which of our sums
    flavours    the table of engines, told apart by the names of their metrics
    sums        sums over restarts, and the figures of a span
    watcher     `Watch`: readings, alerts, what the page shows
    acceptance  acceptance of single requests, and the draft lengths it predicts
    asking      requests of our own within a budget: prediction and audit
    log, app    the store's records; the page, served here

`Watch` needs `outrider[serve]` and neither torch nor a model; `asking` needs torch. See docs/watch.md.
"""

from __future__ import annotations

from outrider.integrations.watch.watcher import Watch

ANSWERS = 2
"""Answers that a request of the watch's own gets to its prompt: an audit sees more in two."""
__all__ = ["ANSWERS", "Watch"]
