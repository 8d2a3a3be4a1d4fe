"""Trust. Owns: how a process comes to judge tokens: keys by its settings, followed, and the revoked ones.

Built by composition roots; servicers are given the verifier alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc

from services.common import logs
from services.common.clock import Clock
from services.common.config import ConfigInvalid
from services.common.errors import TokenInvalid, TokenMissing
from services.common.grpc_types import Handler, Interceptor
from services.common.interceptors import Continuation
from services.common.jwks import KeyFollower, KeySetFile, KeySetUnreadable, source_of
from services.common.redis_client import RedisStore
from services.common.redis_revocations import RedisRevocations
from services.common.revocation import RevocationList
from services.common.token_claims import TimeRules, read_header
from services.common.token_keys import HS256, KeySetInvalid, PublishedKeys, SecretKey, TokenKeys
from services.common.token_settings import TokenSettings
from services.common.tokens import TokenVerifier, bearer_token

# What fails each time is told a dozen times a minute.
AGAIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Trust:
    """Everything that judges tokens in one process.

    Attributes:
        verifier: Believes tokens, or not.
        revocations: The tokens that were taken back.
        interceptors: For the server: lets a call with a new key wait until it was looked for.
        follower: Keeps published keys in step; None: there is one secret.
        required: Whether the process cannot start without keys: a file is there or is a mistake, while an
            issuer may start later than we do.
    """

    verifier: TokenVerifier
    revocations: RevocationList
    interceptors: tuple[Interceptor, ...] = ()
    follower: KeyFollower | None = None
    required: bool = True

    async def load(self) -> None:
        """Reads keys and revocations once.

        Raises:
            ConfigInvalid: The key set has no usable key, or is a file that cannot be read.
        """
        await self.revocations.refresh()
        if self.follower is None:
            return
        try:
            await self.follower.load()
        except KeySetInvalid as error:
            raise ConfigInvalid(f"jwt_jwks: {error}") from None
        except KeySetUnreadable as error:
            if self.required:
                raise ConfigInvalid(f"jwt_jwks: {error}") from None
            logs.get_logger().warning("keys.unread", reason=str(error))

    async def run(self) -> None:
        """Follows both until it is cancelled; a defect in one ends neither."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_follow(self.revocations.run))
            if self.follower is not None:
                group.create_task(_follow(self.follower.run))


async def _follow(run: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await run()
        except Exception:  # noqa: BLE001 - logged: what is known stays as it is, and somebody must learn it
            logs.get_logger().error("trust.crashed", exc_info=True)
        await asyncio.sleep(AGAIN_S)


class NewKeys(Interceptor):
    """Lets a call whose token names an unknown key wait for one look at the issuer's set.

    A token of another family is refused whatever key it names, so nobody looks for that.

    Args:
        follower: Looks.
        algorithm: The family of the deployment.
    """

    def __init__(self, follower: KeyFollower, algorithm: str) -> None:
        self._follower = follower
        self._algorithm = algorithm

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Looks, and goes on; whether the token is believed is the handler's question."""
        metadata = tuple(handler_call_details.invocation_metadata or ())
        with contextlib.suppress(TokenMissing, TokenInvalid):
            header = read_header(bearer_token(metadata))
            if header.get("alg") == self._algorithm:
                await self._follower.learn(header.get("kid"))
        return await continuation(handler_call_details)


def build(settings: TokenSettings, clock: Clock, store: RedisStore | None) -> Trust:
    """Composes what the settings ask for; `store` holds the revocations, None: this process is alone.

    Raises:
        ConfigInvalid: A setting is missing or does not go with the others.
        SecretWeak: The secret is too short, or is a key of another family.
    """
    times = TimeRules(settings.jwt_lifetime_max_s, settings.jwt_leeway_s)
    shared = None if store is None else RedisRevocations(store)
    revocations = RevocationList(shared, times, clock.now)
    if settings.jwt_algorithm == HS256:
        return Trust(_verifier(settings, _secret(settings), clock, revocations), revocations)
    if settings.jwt_jwks is None:
        raise ConfigInvalid(f"jwt_jwks: missing; {settings.jwt_algorithm} needs the issuer's JWK set")
    keys = PublishedKeys(settings.jwt_algorithm)
    try:
        source = source_of(settings.jwt_jwks, http_allowed=settings.jwt_jwks_http)
    except ValueError as error:
        raise ConfigInvalid(f"jwt_jwks: {error}") from None
    follower = KeyFollower(source, keys, clock.monotonic)
    return Trust(
        _verifier(settings, keys, clock, revocations),
        revocations,
        (NewKeys(follower, keys.algorithm),),
        follower,
        required=isinstance(source, KeySetFile),
    )


def _secret(settings: TokenSettings) -> TokenKeys:
    if settings.jwt_jwks is not None:
        raise ConfigInvalid(
            "jwt_jwks: HS256 has a secret and no JWK set; set jwt_algorithm to the keys' family"
        )
    if settings.jwt_secret is None:
        raise ConfigInvalid("jwt_secret: missing; HS256 needs it")
    return SecretKey(settings.jwt_secret.get_secret_value())


def _verifier(
    settings: TokenSettings, keys: TokenKeys, clock: Clock, revocations: RevocationList
) -> TokenVerifier:
    return TokenVerifier(
        keys,
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
        lifetime_max_s=settings.jwt_lifetime_max_s,
        leeway_s=settings.jwt_leeway_s,
        now=clock.now,
        is_revoked=revocations.is_revoked,
    )
