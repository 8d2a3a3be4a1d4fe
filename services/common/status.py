"""Errors on the wire. Owns: how an `InterlockError` becomes a gRPC status, and how one is read back.

A status carries its reason twice: `google.rpc.Status` in `grpc-status-details-bin` for rich clients, and
plain trailing metadata (`interlock-reason`, `retry-after-ms`) for those with grpcio and protobuf alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from services.common.errors import Code, ForeignError, InterlockError, InternalError, every_error
from services.common.grpc_types import Context

DOMAIN = "interlock"
REASON_KEY = "interlock-reason"
RETRY_AFTER_KEY = "retry-after-ms"
# Initial metadata of a call that nothing was done for: Envoy, which sees it, tries another process.
UNSTARTED_KEY = "x-interlock-unstarted"
UNSTARTED = ((UNSTARTED_KEY, "1"),)
REASON_PREFIX = "ERROR_REASON_"

_BY_REASON = {error.reason: error for error in every_error() if error is not ForeignError}


def retry_after_ms(error: InterlockError) -> int | None:
    """The delay in whole milliseconds, rounded up; None where the error names none."""
    return None if error.retry_after_s is None else max(1, math.ceil(error.retry_after_s * 1000))


def trailing_metadata(error: InterlockError) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata of a call that ends with `error`."""
    code = getattr(grpc.StatusCode, error.code.value)
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason=REASON_PREFIX + error.reason, domain=DOMAIN))
    status = status_pb2.Status(code=code.value[0], message=error.message, details=[info])
    metadata: list[tuple[str, str | bytes]] = [(REASON_KEY, REASON_PREFIX + error.reason)]
    delay_ms = retry_after_ms(error)
    if delay_ms is not None:
        retry = any_pb2.Any()
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(delay_ms)
        retry.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        status.details.append(retry)
        metadata.append((RETRY_AFTER_KEY, str(delay_ms)))
    metadata.append(("grpc-status-details-bin", status.SerializeToString()))
    return tuple(metadata)


async def abort(context: Context, error: InterlockError) -> NoReturn:
    """Ends the call with the error's status."""
    code = getattr(grpc.StatusCode, error.code.value)
    if error.unstarted:
        # In the headers, for a proxy decides by them; a stream that has begun has sent its own.
        with contextlib.suppress(grpc.aio.UsageError):
            await context.send_initial_metadata(UNSTARTED)
    await context.abort(code, error.message, trailing_metadata(error))
    raise AssertionError("abort returns never")


def as_interlock_error(error: BaseException) -> InterlockError:
    """What the caller is told of `error`: itself, or an InternalError that reveals nothing."""
    if isinstance(error, InterlockError):
        return error
    if isinstance(error, asyncio.TimeoutError):
        return InternalError("An internal deadline passed. The server's log has the details.")
    return InternalError("Something went wrong on the server. Its log has the details.")


def read_error(error: grpc.RpcError) -> InterlockError:
    """The error that the other side ended a call with.

    A status without a reason of ours (a lost connection, a proxy) becomes a ForeignError.
    """
    metadata = {str(key): value for key, value in (_trailing(error) or ())}
    reason = str(metadata.get(REASON_KEY, "")).removeprefix(REASON_PREFIX)
    code, details = _code(error), _details(error)
    delay = metadata.get(RETRY_AFTER_KEY)
    retry_after_s = int(delay) / 1000 if isinstance(delay, str) and delay.isdigit() else None
    kind = _BY_REASON.get(reason)
    if kind is None or kind.code.value != code.name:
        known = Code(code.name) if code.name in Code.__members__ else Code.INTERNAL
        return ForeignError(known, details, retry_after_s=retry_after_s)
    return kind(details, retry_after_s=retry_after_s)


def _trailing(error: Any) -> Any:
    return error.trailing_metadata() if hasattr(error, "trailing_metadata") else None


def _code(error: Any) -> grpc.StatusCode:
    code = error.code() if hasattr(error, "code") else None
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN


def _details(error: Any) -> str:
    return str(error.details() or "") if hasattr(error, "details") else ""
