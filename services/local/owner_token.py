"""The owner's token. Owns: what a reader of the home may do, and that its file never holds a stale one."""

from __future__ import annotations

import base64
import binascii
import json
import time

from services.common.tokens import SCOPES, mint
from services.local.home import Home, SecretElsewhere

# The longest that the services accept by default.
TOKEN_TTL_S = 86_400.0
# A token that ends within this could end in the middle of a long answer.
_REMAINING_MIN_S = 3_600.0


def owner_token(home: Home, ttl_s: float) -> str:
    """A new token with every scope, signed with the home's secret."""
    return mint(home.jwt_secret, subject="local", scopes=SCOPES, ttl_s=ttl_s)


def renewed_token(home: Home) -> str:
    """The token in the home's file; a new one, written there, when that one is missing or near its end.

    Raises:
        SecretElsewhere: It is missing or over, and no other one that the running mesh believes can be made.
    """
    try:
        token = home.token_file.read_text().strip()
    except FileNotFoundError:
        token = ""
    remaining_s = _expires_s(token) - time.time()
    if remaining_s < _REMAINING_MIN_S:
        try:
            token = owner_token(home, TOKEN_TTL_S)
        except SecretElsewhere:
            # The mesh itself has the secret, and writes a new one before this one ends.
            if remaining_s <= 0:
                raise
            return token
        home.write_token(token)
    return token


def _expires_s(token: str) -> float:
    """When the token ends; 0 for what is no token. Whether it is genuine is the servers' to judge."""
    try:
        payload = token.split(".")[1]
        return float(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"])
    except (IndexError, KeyError, TypeError, ValueError, binascii.Error):
        return 0.0
