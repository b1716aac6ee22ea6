"""Asking other servers: where the address says, and nowhere else."""

from __future__ import annotations

import urllib.request


class Stay(urllib.request.HTTPRedirectHandler):
    """Redirects are answers, not directions: a key, and a text, are for the server they were meant for. They raise HTTPError."""

    def redirect_request(self, *_: object) -> None:  # type: ignore[override]
        return None


OPENER = urllib.request.build_opener(Stay)
"""By the proxies of the environment, as every client."""
DIRECT = urllib.request.build_opener(Stay, urllib.request.ProxyHandler({}))
"""By no proxy."""
