"""`interlock token`. Owns: how a bearer token is made by hand, and which keys servers are told for it."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from services.cli.failure import CommandFailed
from services.common.token_claims import LIMITS_CLAIM, SCOPES, TOKEN_ID_BYTES_MAX, is_name
from services.common.token_keys import SecretWeak
from services.common.token_mint import KeyUnusable, SigningKey, mint, read_signing_key
from services.local.home import Home, HomeUnusable

_SECRET = "INTERLOCK_JWT_SECRET"  # noqa: S105 - the name of a variable
# By claim: the variable that tells services what it must be.
_NAMES = {"iss": "INTERLOCK_JWT_ISSUER", "aud": "INTERLOCK_JWT_AUDIENCE"}


def run(arguments: argparse.Namespace) -> int:
    """Prints one token."""
    scopes = arguments.scope.split()
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise CommandFailed(
            f"no such scope: {' '.join(unknown) or '(none)'}. Scopes are {', '.join(SCOPES)}."
        )
    if not arguments.sub.strip() or not arguments.sub.isprintable():
        raise CommandFailed("--sub must name whom the token is for, in printable characters.")
    extra = {**_names(arguments), **_extra(arguments)}
    try:
        secret = _secret() if arguments.key is None else _signing_key(arguments.key)
        print(mint(secret, subject=arguments.sub, scopes=scopes, ttl_s=arguments.ttl, extra=extra))
    except (SecretWeak, HomeUnusable) as error:
        raise CommandFailed(str(error)) from None
    return 0


def key_set(arguments: argparse.Namespace) -> int:
    """Prints the JWK set of the public halves of some private keys, as services read it."""
    keys = [_signing_key(path).jwk for path in arguments.keys]
    print(json.dumps({"keys": keys}, indent=2))
    return 0


def _secret() -> str:
    given = os.environ.get(_SECRET)
    if given:
        return given
    home = Home.of_environment(os.environ)
    home.require()
    return home.jwt_secret


def _names(arguments: argparse.Namespace) -> dict[str, str]:
    """Issuer and audience, where they are not the usual ones.

    The mesh of a home has the usual ones whatever the environment says: `interlock up` tells its services
    nothing else. Other services read the variables as well.
    """
    given = {"iss": arguments.issuer, "aud": arguments.audience}
    if arguments.key is not None or _is_elsewhere():
        given = {name: given[name] or os.environ.get(variable) for name, variable in _NAMES.items()}
    return {name: value for name, value in given.items() if value is not None}


def _is_elsewhere() -> bool:
    """Whether the secret is the environment's, and not that of a mesh that runs in the home."""
    home = Home.of_environment(os.environ)
    return bool(os.environ.get(_SECRET)) and (home.holder() is None or home.is_secret_elsewhere())


def _signing_key(path: str) -> SigningKey:
    try:
        return read_signing_key(Path(path).read_bytes())
    except KeyUnusable as error:
        raise CommandFailed(f"{path}: {error}.") from None


def _extra(arguments: argparse.Namespace) -> dict[str, Any]:
    """The claims that were asked for beside those that every token has."""
    asked = {
        "tokens_per_minute": arguments.tokens_per_minute,
        "concurrency": arguments.concurrency,
        "weight": arguments.weight,
    }
    limits = {name: value for name, value in asked.items() if value is not None}
    extra: dict[str, Any] = {LIMITS_CLAIM: limits} if limits else {}
    if arguments.jti is not None:
        if not is_name(arguments.jti, TOKEN_ID_BYTES_MAX):
            raise CommandFailed(
                f"--jti has 1 to {TOKEN_ID_BYTES_MAX} bytes, none of them a control character."
            )
        extra["jti"] = arguments.jti
    return extra
