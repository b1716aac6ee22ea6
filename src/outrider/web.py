"""HTTP requests to other servers, without following redirects."""

from __future__ import annotations

import urllib.request


class Stay(urllib.request.HTTPRedirectHandler):
    """Redirects raise HTTPError: an API key and a text must reach only the server they were meant for."""

    def redirect_request(self, *_: object) -> None:  # type: ignore[override]
        return None


OPENER = urllib.request.build_opener(Stay)
"""Uses the proxies of the environment, as other clients do."""
DIRECT = urllib.request.build_opener(Stay, urllib.request.ProxyHandler({}))
"""Uses no proxy."""
