"""The gateway's settings: `INTERLOCK_GATEWAY_<FIELD>`, or a YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr

from services.common.credential import MESH_TOKEN_CHARS_MIN
from services.common.redis_url import REDIS_URL_FORMS
from services.common.token_settings import TokenSettings

REDIS_URL_DEFAULT = SecretStr("redis://127.0.0.1:6379/0")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig(TokenSettings):
    """What one gateway process is told at its start."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Name in the mesh.")] = (
        "gateway-1"
    )
    bind: Annotated[str, Field(description="host:port to listen on; port 0 takes a free one.")] = (
        "127.0.0.1:50051"
    )
    announce_file: Annotated[
        Path | None, Field(description='Written when the port is bound: {"id", "address", "pid", "metrics"}.')
    ] = None
    controllers: Annotated[
        tuple[str, ...], Field(min_length=1, description="host:port of each controller.")
    ] = ("127.0.0.1:50052",)
    fallback_controllers: Annotated[
        tuple[str, ...],
        Field(
            description="host:port of each controller of another mesh, with the same store and join token, "
            "whose model stands in where a revision names it as its fallback."
        ),
    ] = ()
    redis_url: Annotated[SecretStr, Field(description=REDIS_URL_FORMS)] = REDIS_URL_DEFAULT
    cache_dir: Annotated[Path, Field(description="Where tokenizers are kept.")] = Path(".interlock/cache")
    mesh_token: Annotated[
        SecretStr, Field(min_length=MESH_TOKEN_CHARS_MIN, description="Join token of the mesh.")
    ]
    # Unlimited unless an operator says otherwise: a mesh of one team needs no quotas.
    tenant_tokens_per_minute_default: Annotated[
        int | None, Field(ge=1, description="For tokens that name no rate; absent: any number.")
    ] = None
    tenant_tokens_per_minute_max: Annotated[
        int | None, Field(ge=1, description="Most that a token may ask for; absent: any number.")
    ] = None
    tenant_concurrency_default: Annotated[
        int | None,
        Field(ge=1, description="Requests that run at once per model, for tokens that name no number."),
    ] = None
    tenant_concurrency_max: Annotated[
        int | None,
        Field(ge=1, description="Most that a token may ask for: requests that run at once, per model."),
    ] = None
    tenant_weight_default: Annotated[
        int, Field(ge=1, le=100, description="Share in the queue for tokens that name none.")
    ] = 1
    tenant_weight_max: Annotated[
        int, Field(ge=1, le=100, description="Largest share that a token may ask for.")
    ] = 100
    # A minute of work for a busy laptop; beyond it, waiting helps nobody.
    queue_jobs_max: Annotated[
        int, Field(ge=1, le=1_000_000, description="Most jobs that wait per model.")
    ] = 1_000
    # Whoever sends most leaves half of the queue to the others.
    tenant_queue_jobs_max: Annotated[
        int, Field(ge=1, le=1_000_000, description="Most jobs of one tenant that wait per model.")
    ] = 500
    # Most of a minute's queue is served by then; what is still there has been overtaken.
    queue_aging_s: Annotated[
        float, Field(gt=0, description="How long a BATCH job waits before it counts as INTERACTIVE.")
    ] = 30.0
    # Envoy and clients may open this many streams on one connection; each costs about 50 KB here.
    requests_max: Annotated[
        int, Field(ge=1, le=100_000, description="Most requests under way in this process.")
    ] = 4_096
    # The contract's default deadline, and the longest that a client may ask for.
    deadline_default_s: Annotated[float, Field(gt=0)] = 240.0
    deadline_max_s: Annotated[float, Field(gt=0)] = 3_600.0
    # Fits about half a minute of a fast stream; HTTP/2 alone would buffer megabytes.
    credit_tokens: Annotated[int, Field(ge=1, le=65_536, description="Tokens a worker may be ahead.")] = 256
    # An event costs gateway, Envoy and client a quarter to a third of a millisecond together, and a worker on
    # the same cores loses as much on each of its two: so many take 5 or 6 % of its tokens. A few streams hear
    # of each token as it comes, 32 six times a second; see `core.pace`.
    events_per_s: Annotated[
        float,
        Field(ge=0, description="Events with tokens that all streams together get in a second; 0: no bound."),
    ] = 200.0
    # How long an unread stream keeps its slot.
    client_stall_s: Annotated[float, Field(gt=0)] = 30.0
    attempts_max: Annotated[int, Field(ge=1, le=10, description="Workers that a request may use up.")] = 3
    failover_wait_s: Annotated[float, Field(ge=0)] = 15.0
    # A client that was cut off in a tunnel is back within this.
    resume_ttl_s: Annotated[
        float, Field(ge=1, le=86_400, description="How long the log of a resumable request is kept.")
    ] = 600.0
    # Long enough for a phone that changes networks; its answer is logged meanwhile.
    detach_grace_s: Annotated[
        float, Field(ge=0, description="How long a resumable request goes on without a client.")
    ] = 60.0
    # Envoy asks for health once a second: nobody sends new calls here once it has asked.
    drain_notice_s: Annotated[
        float, Field(ge=0, description="How long calls are still taken after health says NOT_SERVING.")
    ] = 1.0
    # A worker says something every second; three of them missed are silence, not a busy machine's hiccup.
    # What it costs and why not less: ADR 15.
    worker_silence_s: Annotated[
        float, Field(ge=1.5, description="How long a worker with requests may say nothing.")
    ] = 3.0
    # The longest step is a chunk of a long prompt: a second on two idle cores, several on crowded ones.
    worker_stall_s: Annotated[
        float, Field(ge=1.5, description="How long the steps of a worker with requests may stand still.")
    ] = 10.0
    drain_grace_s: Annotated[float, Field(ge=0)] = 30.0
    # Existing code sends the names of other models; a mesh with one model answers to them on request.
    model_aliases: Annotated[
        tuple[str, ...],
        Field(
            max_length=256,
            description='Other names of models, as "PATTERN=MODEL": "gpt-*=my-model"; no MODEL: the default.',
        ),
    ] = ()
    metrics_bind: Annotated[
        str,
        Field(
            pattern=r"^(.+:[0-9]{1,5})?$",
            description="host:port of /metrics; port 0 takes a free one, empty turns it off.",
        ),
    ] = ""
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = "info"

    @property
    def aliases(self) -> tuple[tuple[str, str], ...]:
        """Patterns of names, each with the model that it means; empty: the default one."""
        split = (alias.partition("=") for alias in self.model_aliases)
        return tuple((pattern, model) for pattern, _, model in split)
