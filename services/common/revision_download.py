"""Files of a revision from whichever controller leads. Owns: how a download goes on after its controller.

A controller that leaves, or is left, breaks its downloads in the middle. That is no failure of the revision:
the next one has the same bytes, and goes on where the last one ended. Must not know: where bytes go.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import grpc
from interlock.v1 import controller_service_pb2, controller_service_pb2_grpc

from services.common import logs, status
from services.common.credential import mesh_metadata
from services.common.errors import ForeignError, StoreUnavailable

# A controller that was killed is started again, or another one leads, within seconds.
PATIENCE_S = 60.0
# Between two attempts: whoever answers that it does not lead does so at once.
RETRY_S = 0.5

Connected = Callable[[], Awaitable[grpc.aio.Channel]]
"""Returns the channel to the controller that leads, as soon as there is one."""


class RevisionDownload:
    """Reads the files of one revision.

    Args:
        model: The model.
        revision: Its revision.
        mesh_token: The join token of the mesh.
        connected: Whom to ask.
        patience_s: How long nothing may come.
    """

    def __init__(
        self,
        model: str,
        revision: str,
        mesh_token: str,
        connected: Connected,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._model = model
        self._revision = revision
        self._mesh_token = mesh_token
        self._connected = connected
        self._patience_s = patience_s

    async def read(self, path: str, offset: int) -> AsyncGenerator[bytes, None]:
        """Yields a file from `offset` on, by one controller after the other until it is whole.

        Raises:
            StoreUnavailable: No controller sent anything for too long.
            InterlockError: A controller refused: the revision or the file is not what can be downloaded.
        """
        clock = asyncio.get_running_loop().time
        until_s = clock() + self._patience_s
        while True:
            call: Any = None
            try:
                async with asyncio.timeout_at(until_s):
                    call = self._begin(await self._connected(), path, offset)
                while True:
                    async with asyncio.timeout_at(until_s):
                        data = await _next(call)
                    if data is None:
                        return
                    offset += len(data)
                    yield data
                    until_s = clock() + self._patience_s
            except TimeoutError:
                raise StoreUnavailable(
                    f"{path}: no controller sent anything for {self._patience_s:.0f} s."
                    " Start the rollout again when one leads; what came is kept."
                ) from None
            except _Broken as error:
                logs.get_logger().info("download.broken", path=path, offset=offset, cause=str(error))
            finally:
                if call is not None:
                    call.cancel()
            await asyncio.sleep(RETRY_S)

    def _begin(self, channel: grpc.aio.Channel, path: str, offset: int) -> Any:
        stub = controller_service_pb2_grpc.ControllerServiceStub(channel)
        request = controller_service_pb2.DownloadRevisionRequest(
            model=self._model, revision=self._revision, path=path, offset=offset
        )
        try:
            return stub.DownloadRevision(request, metadata=mesh_metadata(self._mesh_token))
        except grpc.aio.UsageError:
            # It was closed in this very moment.
            raise _Broken("closed") from None


class _Broken(Exception):
    """The controller is gone, or leads no more; another one may go on."""


async def _next(call: Any) -> bytes | None:
    """The next bytes; None at the end."""
    try:
        response = await call.read()
    except grpc.aio.UsageError:
        raise _Broken("closed") from None
    except grpc.aio.AioRpcError as error:
        failure = status.read_error(error)
        # A controller's own refusal has a reason of ours.
        if failure.retryable or isinstance(failure, ForeignError):
            raise _Broken(failure.code.value) from None
        raise failure from error
    except asyncio.CancelledError:
        # Closing a channel cancels its calls, and each looks as if we were cancelled.
        current = asyncio.current_task()
        if current is not None and current.cancelling():
            raise
        raise _Broken("closed") from None
    return None if response is grpc.aio.EOF else bytes(response.data)
