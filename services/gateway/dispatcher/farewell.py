"""How a gateway that shuts down parts with its requests. Owns: which end, and which go on without it.

Must not know: when, or how long there is time for it.
"""

from __future__ import annotations

from services.common import logs
from services.common.errors import Draining, StoreUnavailable
from services.gateway.core.log_errors import lost_log
from services.gateway.core.ports import JobQueue
from services.gateway.dispatcher.generation import Generation
from services.gateway.dispatcher.resumption import Resumption

# Another gateway takes calls now, and this one may be back within seconds.
RETRY_WHEN_DRAINING_S = 1.0


def draining() -> Draining:
    """What clients hear whose request, or whose place at a log, this gateway cannot keep."""
    return Draining("The gateway is shutting down.", retry_after_s=RETRY_WHEN_DRAINING_S)


async def part_with(generation: Generation, queue: JobQueue, resumption: Resumption) -> None:
    """Hands a resumable request to another gateway, and ends any other one in-band.

    One that nobody takes, or of which the store does not hear, is left as it is, without a word of an end in
    its log: its lease hands it to whoever comes, which may be this gateway's next process.
    """
    if generation.chronicle is None:
        generation.withdraw(draining())
    elif not generation.ended:
        job, released = generation.job, False
        try:
            released = await queue.release(job.model, job.job_id, job.submission)
        except StoreUnavailable:
            pass
        except Exception:  # noqa: BLE001 - logged; the others are still to be parted with
            logs.get_logger().error("farewell.crashed", exc_info=True)
        if not released:
            logs.get_logger().info("request.kept", request_id=job.request_id)
        _leave(generation, resumption)


async def close(generation: Generation, resumption: Resumption) -> None:
    """Gives up what has not ended by now, and what is still owed to the queue."""
    if generation.chronicle is not None:
        _leave(generation, resumption)
    await generation.close()


def _leave(generation: Generation, resumption: Resumption) -> None:
    # Its clients come first: they would turn to a log that may be out of reach.
    is_torn = generation.chronicle is not None and generation.chronicle.is_torn
    resumption.end(generation.job.job_id, lost_log() if is_torn else draining())
    generation.leave()
