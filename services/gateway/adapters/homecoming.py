"""The way back. Owns: how one live job is told to a store that may know nothing, something old or the truth.

The store may have been emptied, have slept, or have executed a call whose answer was lost. What runs here is
the truth, and takes the place of what its submission has there. Where the store remembers an end of that, the
job is entered under another submission nonce. A resumable job that another gateway took over, or that has
ended for its subject, stays as the store has it: the next renewal tells.
"""

from __future__ import annotations

from collections.abc import Callable

from services.common.errors import InterlockError, StoreUnavailable
from services.gateway.adapters.job_book import LiveEntry, OwedEnd
from services.gateway.core.jobs import Grant, Waiting
from services.gateway.core.ports import JobQueue


async def tell_end(queue: JobQueue, owed: OwedEnd) -> None:
    """Tells the store how a job ended meanwhile; without effect where it knows no such job."""
    if owed.nonce:
        await queue.settle(owed.model, owed.job_id, owed.nonce, owed.outcome, owed.used_tokens)
    await queue.cancel(owed.model, owed.job_id, owed.submission, used_tokens=owed.used_tokens)


async def bring_home(
    queue: JobQueue, entry: LiveEntry, now_s: float, granted: Callable[[LiveEntry, Grant], None]
) -> None:
    """Tells the store one job as it is now.

    Raises:
        StoreUnavailable: It is gone again.
    """
    if entry.grant is None:
        await _bring_waiting(queue, entry, now_s, granted)
    else:
        await _bring_running(queue, entry, entry.grant, now_s)


async def _bring_running(queue: JobQueue, entry: LiveEntry, grant: Grant, now_s: float) -> None:
    if not await queue.register(entry.aged(now_s), grant, instead=True):
        entry.rename()
        # Where this fails, too, the id is somebody else's: the next renewal ends the request.
        await queue.register(entry.aged(now_s), grant)
    entry.at_store = grant.nonce


async def _bring_waiting(
    queue: JobQueue, entry: LiveEntry, now_s: float, granted: Callable[[LiveEntry, Grant], None]
) -> None:
    job = entry.job
    if entry.at_store and await queue.requeue(
        job.model, job.job_id, entry.at_store, emitted=entry.emitted, used_tokens=job.used_tokens
    ):
        entry.at_store = ""
        return
    answer = await _enqueue(queue, entry, now_s)
    if answer is None:
        # It ended there, by another gateway's hand: it lives here.
        entry.rename()
        # Where this fails, too, the id is somebody else's: the next renewal ends the request.
        answer = await _enqueue(queue, entry, now_s)
    entry.at_store = ""
    if isinstance(answer, Grant):
        granted(entry, answer)


async def _enqueue(queue: JobQueue, entry: LiveEntry, now_s: float) -> Grant | Waiting | None:
    """Enters a job that waits; None where another record stands in its way."""
    try:
        return await queue.enqueue(entry.aged(now_s))
    except StoreUnavailable:
        raise
    except InterlockError:
        return None
