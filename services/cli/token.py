"""`interlock token`. Owns: how a bearer token for the local mesh is made by hand."""

from __future__ import annotations

import argparse
import os

from services.cli.failure import CommandFailed
from services.common.tokens import SCOPES, SecretWeak, mint
from services.local.home import Home, HomeUnusable


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
    try:
        home = Home.of_environment(os.environ)
        if not os.environ.get("INTERLOCK_JWT_SECRET"):
            home.require()
        secret = home.jwt_secret
        print(mint(secret, subject=arguments.sub, scopes=scopes, ttl_s=arguments.ttl))
    except (SecretWeak, HomeUnusable) as error:
        raise CommandFailed(str(error)) from None
    return 0
