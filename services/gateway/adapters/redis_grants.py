"""What others tell this gateway. Owns: grants and notices as text, and the channel on which it hears them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from services.common import logs
from services.common.queue_keys import gateway_channel, model_of
from services.common.redis_client import RedisStore
from services.gateway.core.jobs import Grant
from services.gateway.core.log import Notice, NoticeKind

# How long a subscription waits for a message before it looks whether its connection lives.
_LISTEN_TIMEOUT_S = 5.0
# Pauses between attempts to subscribe: soon after a restart, and never a load.
_RESUBSCRIBE_MIN_S = 0.1
_RESUBSCRIBE_MAX_S = 2.0
# Closing a connection takes less.
_CANCEL_AGAIN_S = 0.5
# How a connection ends. LookupError: a cluster whose topology is not settled. RuntimeError: uvloop's word
# for a reset.
_BROKEN = (RedisError, OSError, TimeoutError, LookupError, RuntimeError)


class GrantListener:
    """One subscription, kept up for ever. A message that it misses is repaired by the next renewal."""

    def __init__(
        self,
        store: RedisStore,
        gateway_id: str,
        receive: Callable[[Grant], None],
        notice: Callable[[Notice], None],
    ) -> None:
        self.subscribed = asyncio.Event()
        self._store = store
        self._channel = gateway_channel(gateway_id)
        self._receive = receive
        self._notice = notice
        self._task: asyncio.Task[None] | None = None
        self._logged: set[str] = set()

    def start(self) -> None:
        """Begins to listen; without effect on one that does."""
        if self._task is None:
            self._task = asyncio.create_task(self._listen(), name="queue-grants")

    async def close(self) -> None:
        """Ends the subscription."""
        if self._task is None:
            return
        # While it connects, the library sometimes takes a cancellation for a timeout of its own. Told once,
        # the task would go on for ever, and with it a process that could not start.
        while not self._task.done():
            self._task.cancel()
            await asyncio.wait((self._task,), timeout=_CANCEL_AGAIN_S)
        self._task = None

    async def _listen(self) -> None:
        """Receives for ever; a lost connection is made again, with growing pauses."""
        pause_s = _RESUBSCRIBE_MIN_S
        while True:
            try:
                async with await self._store.open_pubsub() as pubsub:
                    await pubsub.subscribe(self._channel)
                    pause_s = _RESUBSCRIBE_MIN_S
                    await self._receive_messages(pubsub)
            except _BROKEN:
                pass
            except Exception as error:  # noqa: BLE001 - logged; else renewals alone would bring grants
                self._log_once(error)
            self.subscribed.clear()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RESUBSCRIBE_MAX_S)

    async def _receive_messages(self, pubsub: PubSub) -> None:
        while True:
            message = await pubsub.get_message(timeout=_LISTEN_TIMEOUT_S)
            if message is None:
                continue
            if message["type"] == "subscribe":
                self.subscribed.set()
            elif message["type"] == "message":
                self._hear(message["data"])

    def _hear(self, text: str) -> None:
        """Passes a message on. What cannot be read is left: a newer gateway may say what is new."""
        try:
            self._read(text)
        except Exception as error:  # noqa: BLE001 - logged; the next message is another one
            self._log_once(error)

    def _log_once(self, error: Exception) -> None:
        """Logs an error of a kind that was not there before: who sends one such message sends many."""
        kind = type(error).__name__
        if kind not in self._logged:
            self._logged.add(kind)
            logs.get_logger().error("message.dropped", kind=kind, exc_info=error)

    def _read(self, text: str) -> None:
        fields = json.loads(text)
        if "kind" in fields:
            model = model_of(fields["prefix"])
            self._notice(Notice(NoticeKind(fields["kind"]), fields["job_id"], model))
        else:
            self._receive(read_grant(text))


def read_grant(text: str) -> Grant:
    """Reads a grant as the scripts write it."""
    fields = json.loads(text)
    return Grant(
        job_id=fields["job_id"],
        attempt=fields["attempt"],
        nonce=fields["nonce"],
        worker_id=fields["worker_id"],
        worker_address=fields["worker_address"],
        revision=fields["revision"],
        epoch=int(fields["epoch"]),
        trial=fields["trial"],
    )
