"""`interlock token revoke`. Owns: how a token is taken back; the token itself never leaves this machine."""

from __future__ import annotations

import argparse
import asyncio
import time

import jwt
from interlock.v1.controller_service_pb2 import RevokeTokenRequest
from interlock.v1.controller_service_pb2_grpc import ControllerServiceStub

from services.cli.access import ANSWER_TIMEOUT_S, entrance, find_door
from services.cli.failure import CommandFailed


def run(arguments: argparse.Namespace) -> int:
    """Takes one token back and says until when that is remembered."""
    is_id = arguments.id or not _looks_like_a_token(arguments.token)
    token_id = arguments.token if is_id else _token_id(arguments.token)
    forget_s = asyncio.run(_revoke(token_id))
    until = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(forget_s))
    print(
        f"{token_id} is revoked. It is refused everywhere within five seconds, and remembered until {until}."
    )
    if is_id:
        print("It was taken for a token's id as it stands; nobody knows whether there is such a token.")
    return 0


async def _revoke(token_id: str) -> float:
    async with entrance(find_door()) as (channel, metadata):
        reply = await ControllerServiceStub(channel).RevokeToken(
            RevokeTokenRequest(token_id=token_id), metadata=metadata, timeout=ANSWER_TIMEOUT_S
        )
    return reply.forget_time.ToSeconds()


def _looks_like_a_token(given: str) -> bool:
    """Whether it is a token, or was one before it was cut: its header is JSON, and dots part the rest."""
    return given.startswith("eyJ") or "." in given


def _token_id(given: str) -> str:
    """The `jti` inside a token."""
    try:
        # Whether it is genuine does not matter: whoever may revoke may revoke any id.
        claims = jwt.decode(given, options={"verify_signature": False})
    except jwt.PyJWTError:
        raise CommandFailed(
            "this looks like a token and cannot be read: it may be cut or mistyped. Nothing is revoked. "
            "Where it is the id of one, say so with --id."
        ) from None
    token_id = claims.get("jti")
    if not isinstance(token_id, str) or not token_id:
        raise CommandFailed("this token has no jti, so it cannot be revoked; it ends by itself.")
    return token_id
