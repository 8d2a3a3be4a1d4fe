"""Manifests. Owns: what must hold of one before a byte of its files is looked at.

Must not know: what is registered, or where anything is kept.
"""

from __future__ import annotations

import re
from dataclasses import replace

from services.common import artifacts
from services.common.errors import ArgumentInvalid, ArtifactInvalid
from services.controller.core.catalog import Manifest

# The name under which a revision's own record lies beside its files.
RECORD_NAME = "manifest.json"

# The contract's form. A revision's name becomes a directory's: one that begins with a dot would be another's
# parent, or one of those that are on their way.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def check_manifest(manifest: Manifest) -> Manifest:
    """The manifest with what we know better than its sender: its order, its tokenizer's digest, its name.

    Raises:
        ArtifactInvalid: Its files make no revision.
        ArgumentInvalid: Another field is wrong.
    """
    if manifest.revision and _NAME.fullmatch(manifest.revision) is None:
        raise ArgumentInvalid(
            "manifest.revision: 1 to 63 of the characters a-z 0-9 . _ - are allowed, the first no sign."
        )
    _check_fallback(manifest)
    files = [artifacts.FileDigest(one.path, one.size_bytes, one.sha256) for one in manifest.files]
    artifacts.check_files(files)
    _check_names({file.path for file in files})
    digest = artifacts.tokenizer_digest(files)
    if manifest.tokenizer_sha256 not in {"", digest}:
        raise ArgumentInvalid("manifest.tokenizer_sha256: is not the digest of these files.")
    ordered = tuple(sorted(manifest.files, key=lambda file: file.path))
    checked = replace(manifest, files=ordered, tokenizer_sha256=digest)
    return checked if checked.revision else checked.named()


def _check_fallback(manifest: Manifest) -> None:
    name = manifest.fallback_model
    if name and (name == manifest.model or _NAME.fullmatch(name) is None):
        raise ArgumentInvalid(
            "manifest.fallback_model: must be the name of another model: 1 to 63 of the characters "
            "a-z 0-9 . _ -, the first no sign."
        )


def _check_names(names: set[str]) -> None:
    for needed in ("config.json", "tokenizer.json"):
        if needed not in names:
            raise ArtifactInvalid(f"{needed}: is not among the files.")
    if not any(name.endswith(".safetensors") for name in names):
        raise ArtifactInvalid("There are no weights in safetensors format among the files.")
    if RECORD_NAME in names:
        raise ArtifactInvalid(f"{RECORD_NAME}: this name is kept for the manifest itself.")
    if len({name.lower() for name in names}) != len(names):
        raise ArtifactInvalid("Two files have names that differ in case alone.")
