"""Manifests as they come by the wire: what is read of golden prompts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from interlock.v1 import model_pb2 as pb

from services.common.artifacts import FILES_MAX
from services.common.errors import ArgumentInvalid
from services.controller.adapters.member_messages import manifest_message
from services.controller.adapters.upload_messages import read_manifest
from services.controller.core.catalog import GoldenPrompt, Revision


def manifest(*prompts: dict[str, Any]) -> pb.Manifest:
    """A manifest with these golden prompts."""
    return pb.Manifest(
        model="m", context_tokens=64, golden_prompts=[pb.GoldenPrompt(**one) for one in prompts]
    )


def test_golden_prompts_reach_the_workers() -> None:
    """As they were sent, with the contract's default where no length is said."""
    found = read_manifest(
        manifest({"text": "a", "expected": "b"}, {"text": "c", "expected": "d", "max_tokens": 9})
    )
    assert found.golden_prompts == (GoldenPrompt("a", "b", 32), GoldenPrompt("c", "d", 9))
    told = manifest_message(Revision(found, "", 0.0)).golden_prompts
    assert [(one.text, one.expected, one.max_tokens) for one in told] == [("a", "b", 32), ("c", "d", 9)]


def test_they_are_part_of_what_names_a_revision() -> None:
    """Other prompts make another revision; one without any keeps the name that it always had."""
    plain, golden = read_manifest(manifest()), read_manifest(manifest({"text": "a", "expected": "b"}))
    assert plain.named().revision != golden.named().revision
    assert plain.named().revision == "ee36f8df2faa"


def test_a_model_to_fall_back_to_reaches_the_members() -> None:
    """It is part of what names a revision; one without any keeps the name that it always had."""
    found = read_manifest(pb.Manifest(model="m", context_tokens=64, fallback_model="other"))
    assert found.named().revision != read_manifest(manifest()).named().revision
    assert manifest_message(Revision(found, "", 0.0)).fallback_model == "other"


@pytest.mark.parametrize(
    ("prompts", "field"),
    [
        ([{"text": "", "expected": "b"}], "text"),
        ([{"text": "a", "expected": ""}], "expected"),
        ([{"text": "a" * 4_097, "expected": "b"}], "text"),
        ([{"text": "a", "expected": "b", "max_tokens": 0}], "max_tokens"),
        ([{"text": "a", "expected": "b", "max_tokens": 257}], "max_tokens"),
        ([{"text": "a", "expected": "b"}] * 17, "more than 16"),
    ],
)
def test_what_is_refused(prompts: list[dict[str, Any]], field: str) -> None:
    """The refusal names the field."""
    with pytest.raises(ArgumentInvalid, match=field):
        read_manifest(manifest(*prompts))


def test_files_are_counted_before_they_are_read() -> None:
    """A message holds two million of them; reading these one by one would hold up the leader for seconds."""
    most = pb.Manifest(model="m", context_tokens=64, files=[pb.ArtifactFile()] * FILES_MAX)
    assert len(read_manifest(most).files) == FILES_MAX
    most.files.add()
    with pytest.raises(ArgumentInvalid, match=f"manifest.files: more than {FILES_MAX}"):
        read_manifest(most)
