"""The mesh credential. Owns: how services prove to each other that they belong to one mesh.

On one machine it is a join token that every process is given; network position proves nothing.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from services.common.errors import MeshCredentialInvalid

MESH_TOKEN_KEY = "x-interlock-mesh-token"  # noqa: S105 - the name of a metadata key
GATEWAY_ID_KEY = "x-interlock-gateway-id"

# 32 bytes cannot be guessed; a shorter token is a configuration mistake.
MESH_TOKEN_CHARS_MIN = 32


def mesh_metadata(token: str, **extra: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call between services; `extra` keys are written with `_` for `-`."""
    return ((MESH_TOKEN_KEY, token), *((key.replace("_", "-"), value) for key, value in extra.items()))


def check_mesh_token(metadata: Sequence[tuple[str, str | bytes]], token: str) -> None:
    """Raises MeshCredentialInvalid unless `metadata` carries `token`."""
    presented = next((value for key, value in metadata if key == MESH_TOKEN_KEY), "")
    raw = presented if isinstance(presented, bytes) else presented.encode()
    if not hmac.compare_digest(raw, token.encode()):
        raise MeshCredentialInvalid("This call is for members of the mesh; it lacks their credential.")
