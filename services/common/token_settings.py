"""The settings of tokens. Owns: the fields that every service which judges tokens is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, SecretStr


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSettings:
    """How tokens are judged; the same for every gateway and controller of a mesh."""

    jwt_algorithm: Annotated[
        str, Field(pattern="^(HS256|RS256|ES256|EdDSA)$", description="The one family of signatures.")
    ] = "HS256"
    jwt_secret: Annotated[SecretStr | None, Field(description="For HS256: the secret, 32 bytes or more.")] = (
        None
    )
    jwt_jwks: Annotated[
        str | None, Field(description="For the others: the JWK set, as a file's path or an https URL.")
    ] = None
    jwt_jwks_http: Annotated[
        bool, Field(description="Whether an http URL may name another machine. Who is on the way can sign.")
    ] = False
    jwt_issuer: str = "interlock"
    jwt_audience: str = "interlock"
    jwt_lifetime_max_s: Annotated[int, Field(ge=60)] = 86_400
    jwt_leeway_s: Annotated[int, Field(ge=0, le=300)] = 30
