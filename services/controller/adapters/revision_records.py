"""Records of revisions. Owns: the file that says that a revision exists, and what must hold of one.

Must not know: where it lies, or where the revision's files do.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter, ValidationError

from services.common.errors import ArtifactInvalid
from services.controller.adapters.manifest_checks import RECORD_NAME, check_manifest
from services.controller.core.catalog import Manifest

# A thousand files with long names are 400 KB, and golden prompts of the longest kind half as much again.
RECORD_BYTES_MAX = 1 << 20
# The last second that the contract's timestamps can say.
_TIME_MAX_S = 253_402_300_799.0


@dataclass(frozen=True, slots=True)
class _Record:
    """What is written; `content` is the name that the manifest's content gives, or empty."""

    manifest: Manifest
    create_time_s: float
    local_path: str = ""
    content: str = ""


_RECORDS = TypeAdapter(_Record)


def encode(manifest: Manifest, create_time_s: float) -> bytes:
    """The record of a revision.

    Raises:
        ArtifactInvalid: It would be too long to be read again.
    """
    record = _Record(manifest, create_time_s, content=manifest.named().revision)
    text = json.dumps(asdict(record), ensure_ascii=False).encode()
    if len(text) > RECORD_BYTES_MAX:
        raise ArtifactInvalid(
            f"The manifest has {len(text)} bytes; at most {RECORD_BYTES_MAX}. Send fewer golden prompts."
        )
    return text


def decode(text: bytes, model: str, revision: str) -> tuple[Manifest, float]:
    """The manifest of a record, and when its revision was registered, in seconds since the epoch.

    Args:
        text: The record.
        model: Whose it must be.
        revision: The name under which it lies.

    Raises:
        ArtifactInvalid, ArgumentInvalid: It is damaged, or not what was taken in.
    """
    try:
        record = _RECORDS.validate_json(text)
    except ValidationError:
        raise ArtifactInvalid(f"{RECORD_NAME}: is no record of a revision.") from None
    manifest = record.manifest
    if (manifest.model, manifest.revision) != (model, revision):
        raise ArtifactInvalid(f"{RECORD_NAME}: is the record of another revision.")
    if record.content not in {"", manifest.named().revision} or check_manifest(manifest) != manifest:
        raise ArtifactInvalid(f"{RECORD_NAME}: is not what was taken in under this name.")
    if not 0 <= record.create_time_s <= _TIME_MAX_S:
        raise ArtifactInvalid(f"{RECORD_NAME}: has no time that can be told.")
    return manifest, record.create_time_s
