"""Workers over gRPC. Owns: one session for each worker, and how often they are to speak.

Must not know: queues, text or clients. All requests of this gateway at one worker share one stream. One that
ends, or falls silent, is lost for every attempt on it at once; the next order opens another one.
"""

from __future__ import annotations

import asyncio

from services.common.clock import Clock
from services.common.credential import mesh_metadata
from services.gateway.adapters.worker_session import WorkerSession
from services.gateway.core.attempts import WorkOrder
from services.gateway.core.pace import Pace
from services.gateway.core.ports import Attempt, AttemptSink
from services.gateway.core.vital_signs import VitalSigns

# A worker says something every second; three of them missed are silence, not a busy machine's hiccup.
SILENCE_S = 3.0
# The longest step is a chunk of a long prompt: a second on two idle cores, several on crowded ones.
STALL_S = 10.0


class GrpcWorkerPool:
    """The workers that were granted to this gateway, each behind a session.

    Args:
        gateway_id: How this gateway introduces itself.
        mesh_token: The join token of the mesh.
        clock: Measures silence.
        silence_s: How long a worker with requests may say nothing.
        stall_s: How long the steps of a worker with requests may stand still.
        events_per_s: How often something is told of all sequences together; 0: whenever there is something.
    """

    def __init__(
        self,
        gateway_id: str,
        mesh_token: str,
        clock: Clock,
        *,
        silence_s: float = SILENCE_S,
        stall_s: float = STALL_S,
        events_per_s: float = 0.0,
    ) -> None:
        self._metadata = mesh_metadata(mesh_token, **{"x-interlock-gateway-id": gateway_id})
        self._clock = clock
        self._silence_s = silence_s
        self._stall_s = stall_s
        self._pace = Pace(events_per_s)
        self._sessions: dict[str, WorkerSession] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def start(self, worker_id: str, address: str, order: WorkOrder, sink: AttemptSink) -> Attempt:
        """See `WorkerPool.start`."""
        return self._session(worker_id, address).start(order, sink)

    async def close(self) -> None:
        """Ends every session; attempts on them are lost."""
        for session in tuple(self._sessions.values()):
            self._end(session, "the gateway stops")
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _session(self, worker_id: str, address: str) -> WorkerSession:
        """The session with a worker; one to an address that it has left is ended."""
        session = self._sessions.get(worker_id)
        if session is not None and session.address != address:
            self._end(session, "the worker came back elsewhere")
            session = None
        if session is None:
            signs = VitalSigns(self._silence_s, self._stall_s)
            session = WorkerSession(
                worker_id, address, self._metadata, self._clock, signs, self._pace, self._end, self._keep_pace
            )
            self._sessions[worker_id] = session
        return session

    def _keep_pace(self) -> None:
        """Asks workers that generate something for another hold; others hear of it with their next order."""
        for session in tuple(self._sessions.values()):
            session.keep_pace()

    def _end(self, session: WorkerSession, cause: str) -> None:
        if self._sessions.get(session.worker_id) is session:
            del self._sessions[session.worker_id]
        session.lose(cause)
        task = asyncio.get_running_loop().create_task(session.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
