"""Errors as HTTP clients see them."""

from __future__ import annotations

import pytest

from services.common import http_errors
from services.common.errors import (
    Code,
    Draining,
    ForeignError,
    InterlockError,
    MessageTooLarge,
    QueueFull,
    TokenMissing,
    every_error,
)
from services.gateway.core.queue_quota import quota_exceeded


@pytest.mark.parametrize("kind", [kind for kind in every_error() if kind is not ForeignError])
def test_each_error_has_a_status_of_its_own_kind(kind: type[InterlockError]) -> None:
    """A caller's mistake is 4xx, a server's failure 5xx."""
    status = http_errors.status_of(kind("told"))
    assert 400 <= status < 600
    assert (status >= 500) is (
        kind.code.value in {"INTERNAL", "UNIMPLEMENTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
    )


def test_a_full_queue_is_429_with_whole_seconds_and_exact_milliseconds() -> None:
    """The header rounds up, so that nobody comes back too early; the body is exact."""
    error = QueueFull("The queue is full.", retry_after_s=1.2)
    assert http_errors.headers(error) == [("x-interlock-status", "429"), ("retry-after", "2")]
    assert http_errors.fields(error, "request-1") == {
        "code": "RESOURCE_EXHAUSTED",
        "reason": "ERROR_REASON_QUEUE_FULL",
        "message": "The queue is full.",
        "request_id": "request-1",
        "retry_after_ms": 1200,
    }


def test_http_tells_apart_what_grpc_does_not() -> None:
    """Too large and too many share a gRPC code, not a status; an error without a delay has no header."""
    assert http_errors.status_of(MessageTooLarge("Too large.")) == 413
    assert http_errors.headers(TokenMissing("No token.")) == [("x-interlock-status", "401")]


@pytest.mark.parametrize("kind", [kind for kind in every_error() if kind is not ForeignError])
def test_what_trying_again_does_not_mend_says_so(kind: type[InterlockError]) -> None:
    """Where its status alone would have a vendor's client send the request again, and only there."""
    error = kind("told")
    status = http_errors.status_of(error)
    said = dict(http_errors.headers(error)).get("x-should-retry")
    is_retried = status in {409, 429} or status >= 500
    assert said == ("false" if is_retried and not kind.retryable else None)
    # An API of a vendor's has statuses of its own, by which its clients go.
    assert "x-should-retry" not in dict(http_errors.headers(error, 400))


def test_a_request_that_no_minute_can_hold_is_not_sent_again() -> None:
    """Vendors' clients take a 429 for a failure of the moment, unless they are told; one for now is one."""
    never, later = (dict(http_errors.headers(quota_exceeded(tokens, 60, 100, 12.0))) for tokens in (101, 50))
    assert (never["x-interlock-status"], never["x-should-retry"]) == ("429", "false")
    assert "retry-after" not in never
    assert "x-should-retry" not in later
    assert later["retry-after"] == "12"


def test_an_error_of_another_system_is_judged_by_its_code() -> None:
    """What a lost connection came to may go better next time; what crashed may not."""
    headers = [
        dict(http_errors.headers(ForeignError(code, "told"))) for code in (Code.UNAVAILABLE, Code.INTERNAL)
    ]
    assert ["x-should-retry" in one for one in headers] == [False, True]


def test_what_did_nothing_says_so_in_its_headers() -> None:
    """A refusal at the door may be given to another process; one of a request that ran may not."""
    refused = Draining.at_the_door(retry_after_s=1.0)
    assert ("x-interlock-unstarted", "1") in http_errors.headers(refused)
    assert "x-interlock-unstarted" not in dict(http_errors.headers(Draining("Ended.", retry_after_s=1.0)))
