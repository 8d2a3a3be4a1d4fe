"""A client that comes back to a request that is not here. Owns: which queues are asked, and what it hears."""

from __future__ import annotations

from services.common.errors import RequestUnknown, StoreUnavailable
from services.gateway.core.log_errors import not_told_again
from services.gateway.dispatcher.follower import Follower
from services.gateway.dispatcher.generation import Generation
from services.gateway.dispatcher.resumption import Resumption
from services.gateway.dispatcher.rounds import Rounds


async def search(
    resumption: Resumption,
    rounds: Rounds,
    generation: Generation | None,
    tenant: str,
    job_id: str,
    cursor: int,
) -> Follower:
    """Follows a resumable request behind `cursor`, wherever it runs or ran.

    Args:
        resumption: Follows it.
        rounds: Knows the models, and whether the store has lost requests.
        generation: What is here under its id; None: nothing.
        tenant: Whose request it is.
        job_id: Which one.
        cursor: The last event that the client has seen.

    Raises:
        RequestUnknown: No queue knows it.
        StoreUnavailable: Nor that, but one is away, or may yet be told of what the store has lost.
        ArgumentInvalid, QueueFull, WorkerLost: See `Resumption.follow`.
    """
    models: tuple[str, ...] = ()
    try:
        if generation is None:
            claim = await resumption.find(job_id)
            # What somebody has heard of was claimed: where that was lost the logs are asked themselves.
            models = (claim.model,) if claim is not None else rounds.known_models() if cursor else ()
        elif generation.moved:
            resumption.note_moved(generation)
            models = (generation.job.model,)
        follower = await _first_of(models, resumption, tenant, job_id, cursor)
    except StoreUnavailable:
        rounds.note_shaken()
        raise
    if follower is not None:
        return follower
    if models and cursor and rounds.shaken:
        raise not_told_again()
    raise RequestUnknown("No resumable request of that id is known for this subject.")


async def _first_of(
    models: tuple[str, ...], resumption: Resumption, tenant: str, job_id: str, cursor: int
) -> Follower | None:
    away: StoreUnavailable | None = None
    for model in models:
        try:
            return await resumption.follow(tenant, model, job_id, cursor)
        except RequestUnknown:
            continue
        except StoreUnavailable as error:
            # Another one may know it.
            away = error
    if away is not None:
        raise away
    return None
