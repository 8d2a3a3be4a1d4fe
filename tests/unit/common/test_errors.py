"""The error tree against the contract."""

from __future__ import annotations

import inspect
from pathlib import Path

import grpc
import pytest
from interlock.v1 import error_reason_pb2

from services.common import errors
from services.common.errors import ForeignError, InterlockError, every_error


@pytest.mark.parametrize("error", every_error(), ids=lambda error: error.__name__)
def test_each_error_has_a_reason_of_the_contract_and_a_code_of_grpc(error: type[InterlockError]) -> None:
    """A reason that clients cannot look up, or a code that gRPC lacks, would be a silent break."""
    assert f"ERROR_REASON_{error.reason}" in error_reason_pb2.ErrorReason.keys()  # noqa: SIM118 - not a dict
    assert hasattr(grpc.StatusCode, error.code.value)


def test_no_two_errors_share_a_reason() -> None:
    """A reason read from the wire names exactly one class (the root and its defect class aside)."""
    reasons = [error.reason for error in every_error() if error is not InterlockError]
    assert len(reasons) == len(set(reasons))


def test_the_contracts_comment_names_the_code_that_we_send() -> None:
    """The proto documents each reason with its status code; the tree must agree with it."""
    source = inspect.getsourcefile(error_reason_pb2)
    assert source is not None
    text = Path(source.replace("_pb2.py", ".proto")).read_text()
    for error in set(every_error()) - {ForeignError}:
        comment = text[: text.index(f"ERROR_REASON_{error.reason} =")].rstrip().rsplit("\n", 1)[-1]
        assert f"// {error.code.value}: " in comment, error.__name__


def test_the_tree_is_pure() -> None:
    """Cores import the tree, so it must not pull grpc or protobuf in."""
    source = inspect.getsource(errors)
    assert "import grpc" not in source
    assert "protobuf" not in source
