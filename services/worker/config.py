"""The worker's settings: `INTERLOCK_WORKER_<FIELD>`, or a YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr

from services.common.credential import MESH_TOKEN_CHARS_MIN


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What one worker process is told at its start."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Name in the mesh.")] = "worker-1"
    bind: Annotated[str, Field(description="host:port to listen on; port 0 takes a free one.")] = (
        "127.0.0.1:50061"
    )
    announce_file: Annotated[
        Path | None, Field(description='Written when the port is bound: {"id", "address", "pid", "metrics"}.')
    ] = None
    controllers: Annotated[
        tuple[str, ...], Field(min_length=1, description="host:port of each controller.")
    ] = ("127.0.0.1:50052",)
    # The workers of a host share it: they map the same files, and so hold one copy of the weights.
    cache_dir: Annotated[
        Path, Field(description="Where downloaded revisions are kept, and weights in their final layout.")
    ] = Path(".interlock/cache")
    # Room for two models of a size that a machine without a data centre around it can serve.
    cache_forms_bytes: Annotated[
        int, Field(ge=0, description="Most bytes of weights in their final layout; 0: none are stored.")
    ] = 64 << 30
    # The same of files as they come, before they are quantized. Those that are local are not copied.
    cache_revisions_bytes: Annotated[
        int,
        Field(
            ge=0,
            description="Most bytes of downloaded revisions; beyond it those go that no worker uses.",
        ),
    ] = 64 << 30
    mesh_token: Annotated[
        SecretStr, Field(min_length=MESH_TOKEN_CHARS_MIN, description="Join token of the mesh.")
    ]
    device: Annotated[str, Field(pattern="^(auto|cpu|cuda)$", description="Where to compute.")] = "auto"
    slots: Annotated[int, Field(ge=1, le=1024, description="Sequences that run at once.")] = 32
    threads: Annotated[int, Field(ge=0, description="CPU threads of the model; 0: all cores.")] = 0
    prefill_chunk_tokens: Annotated[
        int, Field(ge=16, le=65_536, description="Most prompt tokens in one step.")
    ] = 512
    # Streams wait for it between two of their tokens, so it is a fraction of the above.
    prefill_chunk_shared_tokens: Annotated[
        int, Field(ge=16, le=65_536, description="Most prompt tokens in a step that also decodes.")
    ] = 128
    # Two at once while one revision replaces another: pages are taken only where something is written.
    kv_cache_bytes: Annotated[
        int,
        Field(
            ge=0,
            description="Memory of a revision's KV cache; 0: a quarter of what is free after its load,"
            " on a CPU after the first load.",
        ),
    ] = 0
    # Kept rows yield at once to sequences that need room, so the share bounds memory, not service. The rest
    # stays free of them: a sequence that begins finds rows that need not be copied away first.
    prefix_cache_share: Annotated[
        float,
        Field(ge=0, le=0.9, description="Part of the KV cache for prefixes of ended requests; 0: none."),
    ] = 0.5
    # The slowest step on a busy laptop takes a few seconds; beyond this it hangs.
    watchdog_s: Annotated[float, Field(gt=0, description="A step that takes longer ends the process.")] = 30.0
    memory_bytes: Annotated[
        int,
        Field(ge=0, description="Memory that weights may take, for loads and rollouts; 0: the device's."),
    ] = 0
    drain_grace_s: Annotated[float, Field(ge=0)] = 30.0
    metrics_bind: Annotated[
        str,
        Field(
            pattern=r"^(.+:[0-9]{1,5})?$",
            description="host:port of /metrics; port 0 takes a free one, empty turns it off.",
        ),
    ] = ""
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = "info"
