"""The controller's settings: `INTERLOCK_CONTROLLER_<FIELD>`, or a YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr

from services.common.credential import MESH_TOKEN_CHARS_MIN
from services.common.redis_url import REDIS_URL_FORMS
from services.common.token_settings import TokenSettings

REDIS_URL_DEFAULT = SecretStr("redis://127.0.0.1:6379/0")
ARTIFACTS_URL_DEFAULT = SecretStr("")


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerConfig(TokenSettings):
    """What one controller process is told at its start."""

    id: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9._-]{1,64}$",
            description="Name in the mesh; two of one name take the lead from each other.",
        ),
    ] = "controller-1"
    bind: Annotated[str, Field(description="host:port to listen on; port 0 takes a free one.")] = (
        "127.0.0.1:50052"
    )
    announce_file: Annotated[
        Path | None, Field(description='Written when the port is bound: {"id", "address", "pid", "metrics"}.')
    ] = None
    redis_url: Annotated[SecretStr, Field(description=REDIS_URL_FORMS)] = REDIS_URL_DEFAULT
    mesh_token: Annotated[
        SecretStr, Field(min_length=MESH_TOKEN_CHARS_MIN, description="Join token of the mesh.")
    ]
    model_path: Annotated[Path, Field(description="Directory of the model, in Hugging Face format.")]
    model_name: Annotated[
        str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="Name that requests give.")
    ]
    quantization: Annotated[str, Field(pattern="^(auto|none|int8|nf4|fp4)$")] = "auto"
    compute_dtype: Annotated[str, Field(pattern="^(auto|fp32|bf16)$")] = "auto"
    context_tokens: Annotated[
        int, Field(ge=0, description="Most tokens of prompt and output; 0: the model's.")
    ] = 0
    # Members report every second; five missed reports are a loss, not a hiccup.
    lease_ttl_s: Annotated[float, Field(gt=1)] = 5.0
    # Renewed every second; a standby leads within this and two seconds more after a leader's death.
    lead_ttl_s: Annotated[float, Field(ge=2, description="How long the lead holds that is not renewed.")] = (
        4.0
    )
    prepare_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    data_dir: Annotated[Path, Field(description="Where rollouts and uploads are kept.")] = Path(
        ".interlock/controller"
    )
    artifacts_url: Annotated[
        SecretStr,
        Field(
            description="Where uploaded revisions are kept, as fsspec reads it, such as s3://bucket/prefix;"
            " data_dir is a cache of it then. Empty: in data_dir alone."
        ),
    ] = ARTIFACTS_URL_DEFAULT
    uploads_bytes: Annotated[
        int,
        Field(
            ge=0,
            description="Most bytes of uploaded contents that are kept, each once. On a file system without"
            " hard links every revision has copies of its files beside them, which are not counted.",
        ),
    ] = 256 << 30
    metrics_bind: Annotated[
        str,
        Field(
            pattern=r"^(.+:[0-9]{1,5})?$",
            description="host:port of /metrics; port 0 takes a free one, empty turns it off.",
        ),
    ] = ""
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = "info"
