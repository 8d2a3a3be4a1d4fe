"""Errors under HTTP. Owns: their status, their JSON shape and their headers, the same for every service.

Envoy passes bodies as they are; a status other than 200 travels in the initial metadata `STATUS_KEY`, which a
filter of Envoy turns into the response's own.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

from services.common import allowance
from services.common.errors import Code, InterlockError
from services.common.status import REASON_PREFIX, UNSTARTED, retry_after_ms

STATUS_KEY = "x-interlock-status"
RETRY_AFTER_HEADER = "retry-after"
# What the vendors' clients ask before they send a request again by themselves; without it they go by the
# status, and conflicts, 429 and all of 500 and above are failures of the moment to them.
SHOULD_RETRY_HEADER = "x-should-retry"
_RETRIED, _RETRIED_FROM = frozenset({409, 429}), 500

_STATUS_BY_CODE = MappingProxyType(
    {
        Code.INVALID_ARGUMENT: 400,
        Code.UNAUTHENTICATED: 401,
        Code.PERMISSION_DENIED: 403,
        Code.NOT_FOUND: 404,
        Code.ALREADY_EXISTS: 409,
        Code.ABORTED: 409,
        Code.FAILED_PRECONDITION: 412,
        Code.RESOURCE_EXHAUSTED: 429,
        Code.CANCELLED: 499,
        Code.INTERNAL: 500,
        Code.UNIMPLEMENTED: 501,
        Code.UNAVAILABLE: 503,
        Code.DEADLINE_EXCEEDED: 504,
    }
)
# HTTP tells these apart where gRPC has one code.
_STATUS_BY_REASON = MappingProxyType({"MESSAGE_TOO_LARGE": 413})


def status_of(error: InterlockError) -> int:
    """The HTTP status of an error."""
    return _STATUS_BY_REASON.get(error.reason, _STATUS_BY_CODE[error.code])


def retry_after_header(error: InterlockError) -> str | None:
    """The delay that an error names, as HTTP has it: whole seconds, rounded up; None: it names none."""
    return None if error.retry_after_s is None else str(max(1, math.ceil(error.retry_after_s)))


def headers(error: InterlockError, status: int | None = None) -> list[tuple[str, str]]:
    """The initial metadata of a call that fails before its first byte; `status`: where an API has its own.

    An error that trying again does not mend says `x-should-retry: false` where its status alone would have
    the vendors' clients send the request again: it may have missed its deadline, ended workers,
    or be larger than any minute's quota.
    """
    code = status or status_of(error)
    found = [(STATUS_KEY, str(code)), *allowance.headers(error.allowance)]
    found += UNSTARTED if error.unstarted else ()
    if not error.retryable and (code in _RETRIED or code >= _RETRIED_FROM):
        found.append((SHOULD_RETRY_HEADER, "false"))
    delay = retry_after_header(error)
    return found if delay is None else [*found, (RETRY_AFTER_HEADER, delay)]


def fields(error: InterlockError, request_id: str) -> dict[str, Any]:
    """What stands under `error` in a body or in the last event of a stream."""
    found: dict[str, Any] = {
        "code": error.code.value,
        "reason": REASON_PREFIX + error.reason,
        "message": error.message,
        "request_id": request_id,
    }
    delay_ms = retry_after_ms(error)
    return found if delay_ms is None else {**found, "retry_after_ms": delay_ms}
