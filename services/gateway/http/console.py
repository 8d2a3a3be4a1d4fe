"""The console page. Owns: its bytes, and what a browser may do while it shows them."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

TYPE = "text/html; charset=utf-8"
PAGE = resources.files(__package__).joinpath("console.html").read_bytes()


def _allowed(tag: str) -> str:
    """The page's own elements of a kind, by their digests: nothing else runs or paints."""
    texts = re.findall(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), PAGE, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


_POLICY = (
    "default-src 'none'",
    f"script-src {_allowed('script')}",
    f"style-src {_allowed('style')}",
    # It asks the server that it came from.
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
)
HEADERS = (
    ("content-security-policy", "; ".join(_POLICY)),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cache-control", "no-cache"),
)
