"""The gateway's settings: `INTERLOCK_GATEWAY_<FIELD>`, or a YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr

from services.common.credential import MESH_TOKEN_CHARS_MIN

REDIS_URL_DEFAULT = SecretStr("redis://127.0.0.1:6379/0")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """What one gateway process is told at its start."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Name in the mesh.")] = (
        "gateway-1"
    )
    bind: Annotated[str, Field(description="host:port to listen on; port 0 takes a free one.")] = (
        "127.0.0.1:50051"
    )
    announce_file: Annotated[
        Path | None, Field(description='Written when the port is bound: {"id", "address", "pid"}.')
    ] = None
    controllers: Annotated[
        tuple[str, ...], Field(min_length=1, description="host:port of each controller.")
    ] = ("127.0.0.1:50052",)
    redis_url: Annotated[SecretStr, Field(description="redis://, rediss:// or unix:// URL.")] = (
        REDIS_URL_DEFAULT
    )
    cache_dir: Annotated[Path, Field(description="Where tokenizers are kept.")] = Path(".interlock/cache")
    mesh_token: Annotated[
        SecretStr, Field(min_length=MESH_TOKEN_CHARS_MIN, description="Join token of the mesh.")
    ]
    jwt_secret: Annotated[SecretStr, Field(description="HS256 secret, 32 bytes or more.")]
    jwt_issuer: str = "interlock"
    jwt_audience: str = "interlock"
    jwt_lifetime_max_s: Annotated[int, Field(ge=60)] = 86_400
    jwt_leeway_s: Annotated[int, Field(ge=0, le=300)] = 30
    # A minute of work for a busy laptop; beyond it, waiting helps nobody.
    queue_jobs_max: Annotated[
        int, Field(ge=1, le=1_000_000, description="Most jobs that wait per model.")
    ] = 1_000
    # Envoy and clients may open this many streams on one connection; each costs about 50 KB here.
    requests_max: Annotated[
        int, Field(ge=1, le=100_000, description="Most requests under way in this process.")
    ] = 4_096
    # The contract's default deadline, and the longest that a client may ask for.
    deadline_default_s: Annotated[float, Field(gt=0)] = 240.0
    deadline_max_s: Annotated[float, Field(gt=0)] = 3_600.0
    # Fits about half a minute of a fast stream; HTTP/2 alone would buffer megabytes.
    credit_tokens: Annotated[int, Field(ge=1, le=65_536, description="Tokens a worker may be ahead.")] = 256
    # How long an unread stream keeps its slot.
    client_stall_s: Annotated[float, Field(gt=0)] = 30.0
    attempts_max: Annotated[int, Field(ge=1, le=10, description="Workers that a request may use up.")] = 3
    failover_wait_s: Annotated[float, Field(ge=0)] = 15.0
    # A worker says something every second; twice that is silence, not a hiccup.
    worker_silence_s: Annotated[
        float, Field(ge=1.5, description="How long a worker with requests may say nothing.")
    ] = 2.0
    # The longest step is a chunk of a long prompt: a second on two idle cores, several on crowded ones.
    worker_stall_s: Annotated[
        float, Field(ge=1.5, description="How long the steps of a worker with requests may stand still.")
    ] = 5.0
    drain_grace_s: Annotated[float, Field(ge=0)] = 30.0
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = "info"
