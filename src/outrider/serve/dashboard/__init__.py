"""The page that a server shows at `/`, and what a browser is allowed to do with it. Imports no engine: `outrider watch` shows it
too."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parent / "index.html"
CSP = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "x-frame-options": "DENY"}
"""Sent with every reply."""
PAGE_HEADERS = {"content-security-policy": CSP, "cache-control": "no-store"}
"""Sent with the page itself."""
