"""What a log line looks like, and what it never holds."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import structlog

from services.common import logs


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Leaves the process's log settings as they were."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_a_line_is_json_with_service_instance_and_annotations(capsys: pytest.CaptureFixture[str]) -> None:
    """Programs read the lines: one object each, with a time in UTC."""
    logs.configure("gateway", "gateway-1")
    logs.annotate(request_id="request-1")
    logs.get_logger().info("request.finished", tokens=3)
    line = json.loads(capsys.readouterr().err)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "request.finished",
        "level": "info",
        "service": "gateway",
        "instance": "gateway-1",
        "request_id": "request-1",
        "tokens": 3,
    }


def test_a_traceback_shows_no_local_variable(capsys: pytest.CaptureFixture[str]) -> None:
    """Locals may be prompts, tokens or secrets."""
    logs.configure("gateway", "gateway-1")
    # Made here, so that the source lines of the traceback do not hold it either.
    prompt = "".join(chr(ord("a") + number) for number in range(10, 26))
    try:
        _fail(prompt)
    except ValueError as error:
        logs.get_logger().error("rpc.crashed", exc_info=error)
    printed = capsys.readouterr().err
    assert "_fail" in printed
    assert prompt not in printed


def test_the_level_silences_what_is_below(capsys: pytest.CaptureFixture[str]) -> None:
    """`--log-level error` means it."""
    logs.configure("gateway", "gateway-1", level="error")
    logs.get_logger().info("request.finished")
    assert capsys.readouterr().err == ""


def _fail(prompt: str) -> None:
    del prompt
    raise ValueError("broken")
