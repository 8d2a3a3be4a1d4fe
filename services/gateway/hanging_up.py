"""Hanging up. Owns: how the call of a client that does not read is ended from outside its handler.

The handler waits in a write that only the client can end, so nothing that it does itself would free it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from services.common import logs, status
from services.common.errors import InterlockError
from services.common.grpc_types import Context
from services.gateway.dispatcher.streams import HangUp

# The statuses on their way; each is gone once its client reads it, or its connection ends.
_telling: set[asyncio.Task[None]] = set()


def hanging_up(context: Context) -> HangUp:
    """What ends the call whose handler asks for it, with an error's status.

    The status waits behind what the client has not read, with the stream itself: gRPC gives a server no way
    to reset one. What the handler holds is freed at once.
    """
    handler = asyncio.current_task()
    loop = asyncio.get_running_loop()

    def hang_up(error: InterlockError) -> None:
        # The log line that a handler writes when it is cut off does not say why.
        logs.get_logger().info("call.hung_up", reason=error.reason)
        task = loop.create_task(_end(context, handler, error), name="hang-up")
        _telling.add(task)
        task.add_done_callback(_telling.discard)

    return hang_up


async def _end(context: Context, handler: asyncio.Task[Any] | None, error: InterlockError) -> None:
    telling = asyncio.ensure_future(status.abort(context, error))
    # Its first step marks the call as ended; only then may the handler go.
    await asyncio.sleep(0)
    if handler is not None:
        handler.cancel()
    # It always raises: that it is told, or that the client is gone.
    await asyncio.gather(telling, return_exceptions=True)
