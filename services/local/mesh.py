"""The mesh on one machine. Owns: which processes there are, the order of their start and end, and the state.

Everything depends on the store, members on the controller's address, Envoy on the gateways'. Members start
together, and while the controller reads the model: that and loading it take longest, and what comes before
them needs nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from deploy.envoy.parameters import Endpoint, Parameters
from services.common.clock import Clock
from services.local import parts, probes, redis_server, revision_log, state, store_probe
from services.local.child import Child, Event, Launch, Started
from services.local.envoy_proxy import EnvoyProxy
from services.local.home import Home
from services.local.owner_token import owner_token
from services.local.parts import MeshPlan, ServicePart
from services.local.ports import Ports
from services.local.state import MeshState, Part
from services.local.supervisor import PartFailed, StopStage, Supervisor, failed
from services.local.waits import together, unless_failed

LOOPBACK = "127.0.0.1"

# Processes that load no model; a busy machine with two cores needs a tenth of it.
_START_TIMEOUT_S = 60.0
# The controller gives a preparation 600 s; what it says then is better than what we could.
_WORKER_TIMEOUT_S = 660.0
# The controller reads the model whole before it leads; a worker does so as well, and has as long for it.
_LEAD_TIMEOUT_S = 660.0
# Each look is a line in the controller's log.
_LIST_INTERVAL_S = 0.5
# How long a restarted process may take to say where it listens before the state file keeps the old word.
_ANNOUNCE_TIMEOUT_S = 60.0
# After the state file could not be written: it names a process that is gone until then.
_STATE_RETRY_S = 1.0

# Gateways and workers drain for at most 30 s (`drain_grace_s`); the rest holds nothing that must end well.
_DRAIN_GRACE_S = 35.0
_QUICK_GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class PartReady:
    """A part can serve.

    Attributes:
        id: Its name.
        address: Where.
        took_s: Time since the mesh began to start.
    """

    id: str
    address: str
    took_s: float


@dataclass(frozen=True, slots=True)
class ModelRead:
    """A controller reads the model, and cannot lead before it has.

    Attributes:
        id: Its name.
        read_bytes: How much it has read.
        size_bytes: Of how much.
    """

    id: str
    read_bytes: int
    size_bytes: int


class LocalMesh:
    """One mesh: its processes, from the first start to the last end.

    Args:
        home: Its home, locked by the caller.
        plan: What it consists of.
        ports: Where it listens.
        clock: For timeouts and restarts.
        tell: Hears what happens.
        environ: What its processes see; `INTERLOCK_REDIS_URL` replaces its own store.
    """

    def __init__(
        self,
        home: Home,
        plan: MeshPlan,
        ports: Ports,
        clock: Clock,
        tell: Callable[[Event | PartReady | ModelRead], None],
        *,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._home = home
        self._plan = plan
        self._ports = ports
        self._clock = clock
        self._tell = tell
        self._redis_url = environ.get("INTERLOCK_REDIS_URL", "")
        self._supervisor = Supervisor(home.logs, clock, self._on_event)
        self._services: dict[str, ServicePart] = {}
        self._children: dict[str, Child] = {}
        self._state: MeshState | None = None
        self._refreshing: set[asyncio.Task[None]] = set()
        self._started_s = clock.monotonic()

    async def start(self) -> MeshState:
        """Starts everything and writes the state file.

        Raises:
            PartFailed: A process could not serve; those that run are the caller's to stop.
        """
        self._started_s = self._clock.monotonic()
        redis = await self._start_redis()
        controllers = await self._start_controllers()
        # One whose model cannot be served ends while it reads it.
        workers, gateways, envoy, admin = await unless_failed(
            self._start_others(controllers), [self._ended(part) for part in controllers]
        )
        await self._all_serving(workers, gateways, envoy, controllers)
        self._state = MeshState(
            http=f"http://{envoy.address}",
            gateways=gateways,
            controllers=controllers,
            workers=workers,
            envoy=envoy,
            redis=redis,
            token_file=str(self._home.token_file),
            pid=os.getpid(),
            model=self._plan.model_name,
            admin=admin,
        )
        state.write(self._home.state_file, self._state)
        return self._state

    async def stop(self, hurry: asyncio.Event) -> None:
        """Ends everything: gateways finish their streams first, on everything that these stand on.

        Envoy carries those streams, so it lives until the last of them ended. New requests meet gateways
        that say that they are draining.
        """
        # Whatever the disk says, streams shall get their end.
        with contextlib.suppress(OSError):
            self._home.state_file.unlink(missing_ok=True)
        for task in self._refreshing:
            task.cancel()
        await asyncio.gather(*self._refreshing, return_exceptions=True)
        stages = (
            StopStage(self._ids("gateway"), _DRAIN_GRACE_S),
            StopStage(self._ids("worker"), _DRAIN_GRACE_S),
            StopStage(self._ids("controller"), _QUICK_GRACE_S),
            StopStage(("envoy",), _QUICK_GRACE_S),
            StopStage(("redis",), _QUICK_GRACE_S),
        )
        await self._supervisor.stop(stages, hurry)

    async def _start_redis(self) -> Part:
        if self._redis_url:
            shown = _without_secrets(self._redis_url)
            if not await store_probe.listens(self._redis_url):
                raise PartFailed(f"Redis at {shown} (INTERLOCK_REDIS_URL) cannot be reached. Does it run?")
            return Part("redis", shown, 0)
        socket = self._home.socket_path()
        self._redis_url = redis_server.url(socket)

        def launch() -> Launch:
            # A server that was killed leaves its socket, and a new one refuses to bind over it.
            socket.unlink(missing_ok=True)
            return Launch(redis_server.command(socket), parts.plain(os.environ))

        child = await self._start_child("redis", launch)
        answers = probes.until(lambda: probes.redis_answers(socket))
        await self._supervisor.ready(child, answers, _START_TIMEOUT_S)
        return self._tell_ready(Part("redis", self._redis_url, child.pid or 0))

    async def _start_controllers(self) -> tuple[Part, ...]:
        """Starts them one after the other; whichever has read the model first leads, mostly the first one."""
        return tuple(
            [
                await self._start_service(
                    parts.controller(self._home, number, f"{LOOPBACK}:{port}", self._plan, self._shared())
                )
                for number, port in enumerate(self._ports.controllers, 1)
            ]
        )

    async def _start_others(
        self, controllers: tuple[Part, ...]
    ) -> tuple[tuple[Part, ...], tuple[Part, ...], Part, str]:
        """Starts members and Envoy; returns them, and Envoy's admin address."""
        workers, gateways = await self._start_members(json.dumps([part.address for part in controllers]))
        return workers, gateways, *await self._start_envoy(gateways, controllers)

    async def _start_members(self, controllers: str) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
        shared = self._shared()
        workers = [
            parts.worker(self._home, number, f"{LOOPBACK}:{port}", controllers, self._plan, shared)
            for number, port in enumerate(self._ports.workers, 1)
        ]
        gateways = [
            parts.gateway(self._home, number, f"{LOOPBACK}:{port}", controllers, shared)
            for number, port in enumerate(self._ports.gateways, 1)
        ]
        found = {part.id: part for part in (*workers, *gateways)}
        listening: dict[str, Part] = {}

        async def start(id_: str) -> None:
            listening[id_] = await self._start_service(found[id_])

        await together(*(start(id_) for id_ in found))
        return tuple(listening[part.id] for part in workers), tuple(listening[part.id] for part in gateways)

    async def _start_service(self, service: ServicePart) -> Part:
        """Starts a server process and waits until it says where it listens."""
        self._services[service.id] = service
        service.metrics_bind = f"{LOOPBACK}:{self._ports.metrics_of(service.id)}"
        child = await self._start_child(service.id, service.launch)
        listening = probes.until(lambda: probes.announced(service.announce_file, child.pid))
        part = await self._supervisor.ready(child, listening, _START_TIMEOUT_S)
        # From now on it is known by this address: a restart binds it again.
        service.bind, service.metrics_bind = part.address, part.metrics
        return part

    async def _start_envoy(
        self, gateways: tuple[Part, ...], controllers: tuple[Part, ...]
    ) -> tuple[Part, str]:
        proxy = EnvoyProxy(
            self._home.run,
            Parameters(
                listen=Endpoint(LOOPBACK, self._ports.http),
                admin=self._home.admin_socket_path(),
                gateways=tuple(Endpoint.parse(part.address) for part in gateways),
                controllers=tuple(Endpoint.parse(part.address) for part in controllers),
            ),
        )
        child = await self._start_child("envoy", lambda: Launch(proxy.command(), parts.plain(os.environ)))
        bound = await self._supervisor.ready(child, probes.until(proxy.bound), _START_TIMEOUT_S)
        proxy.keep_ports(bound)
        return Part("envoy", str(bound.http), child.pid or 0), bound.admin

    async def _start_child(self, id: str, launch: Callable[[], Launch]) -> Child:  # noqa: A002 - the field's name
        self._children[id] = await self._supervisor.start(id, launch)
        return self._children[id]

    async def _all_serving(
        self,
        workers: tuple[Part, ...],
        gateways: tuple[Part, ...],
        envoy: Part,
        controllers: tuple[Part, ...],
    ) -> None:
        """Waits until every member says SERVING, and a request could pass through Envoy."""
        ended = [self._ended(part) for part in (*controllers, *workers, *gateways)]
        # The members' time begins when somebody can tell them what to prepare.
        await unless_failed(self._led(controllers), ended)
        token = owner_token(self._home, _WORKER_TIMEOUT_S)
        # Whichever leads lists the workers; the others refuse.
        listed = [self._worker_failure(part, told, token) for part in workers for told in controllers]
        serving = together(
            *(self._member_serving(part, controllers) for part in workers),
            # A gateway serves when it has the tokenizer, which the first worker's revision decides.
            *(self._member_serving(part, controllers) for part in gateways),
        )
        await unless_failed(serving, listed)
        passes = probes.until(lambda: probes.http_ok(envoy.address, "/readyz"))
        await self._supervisor.ready(self._children["envoy"], passes, _START_TIMEOUT_S)
        self._tell_ready(envoy)

    async def _led(self, controllers: tuple[Part, ...]) -> None:
        """Waits until one controller leads; the others say NOT_SERVING, and are ready for that."""
        told: dict[str, tuple[int, int]] = {}

        async def leader() -> Part | None:
            for part in controllers:
                self._tell_read(part, told)
            found = await asyncio.gather(
                *(probes.serving(part.address) for part in controllers), return_exceptions=True
            )
            return next(
                (part for part, serves in zip(controllers, found, strict=True) if serves is True), None
            )

        leading = await self._supervisor.ready(
            self._children[controllers[0].id], probes.until(leader), _LEAD_TIMEOUT_S
        )
        for part in (leading, *(part for part in controllers if part is not leading)):
            self._tell_ready(part)

    def _tell_read(self, part: Part, told: dict[str, tuple[int, int]]) -> None:
        """Tells how much of the model a controller has read, where its log has something new."""
        child = self._children[part.id]
        read = revision_log.model_read(child.log, child.log_start_bytes)
        if read is not None and read != told.get(part.id):
            told[part.id] = read
            self._tell(ModelRead(part.id, *read))

    async def _ended(self, part: Part) -> None:
        """Raises PartFailed when the process has ended without being asked to; else never ends."""
        child = self._children[part.id]
        await child.crashed()
        raise failed(child, "ended at its start")

    async def _member_serving(self, part: Part, controllers: tuple[Part, ...]) -> None:
        """Waits until it serves; a member that lives but could not prepare the model is an error at once."""
        told = [self._children[controller.id] for controller in controllers]

        async def serving_or_failed() -> str | None:
            for one in told:
                if failure := revision_log.failure(one.log, one.log_start_bytes, part.id):
                    return failure
            return "" if await probes.serving(part.address) else None

        child = self._children[part.id]
        failure = await self._supervisor.ready(child, probes.until(serving_or_failed), _WORKER_TIMEOUT_S)
        if failure:
            raise failed(child, f"could not prepare the model: {failure.rstrip('.')}")
        self._tell_ready(part)

    async def _worker_failure(self, part: Part, controller: Part, token: str) -> None:
        """Raises PartFailed when the controller lists the worker's revision as failed; else never ends.

        It says what a controller that logs errors alone keeps to itself.
        """
        failure = await probes.until(
            lambda: probes.worker_failure(controller.address, token, part.id), interval_s=_LIST_INTERVAL_S
        )
        raise failed(self._children[part.id], f"could not prepare the model: {failure.rstrip('.')}")

    def _tell_ready(self, part: Part) -> Part:
        self._tell(PartReady(part.id, part.address, self._clock.monotonic() - self._started_s))
        return part

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Started) and self._state is not None:
            task = asyncio.create_task(self._refresh(event.id, event.pid), name=f"refresh-{event.id}")
            self._refreshing.add(task)
            task.add_done_callback(self._refreshing.discard)
        self._tell(event)

    async def _refresh(self, id: str, pid: int) -> None:  # noqa: A002 - the field's name
        """Names the new process in the state file, once it listens."""
        service = self._services.get(id)
        if service is not None:
            listening = probes.until(lambda: probes.announced(service.announce_file, pid))
            try:
                await asyncio.wait_for(listening, _ANNOUNCE_TIMEOUT_S)
            except TimeoutError:
                # It does not come up; its log and the terminal say so, again and again.
                return
        if self._state is not None:
            self._state = self._state.with_pid(id, pid)
        while self._state is not None:
            try:
                # The newest, also when another process was renewed meanwhile.
                state.write(self._home.state_file, self._state)
            except OSError:
                await asyncio.sleep(_STATE_RETRY_S)
            else:
                return

    def _shared(self) -> dict[str, str]:
        return {
            "INTERLOCK_REDIS_URL": self._redis_url,
            "INTERLOCK_JWT_SECRET": self._home.jwt_secret,
            "INTERLOCK_MESH_TOKEN": self._home.mesh_token,
        }

    def _ids(self, service: str) -> tuple[str, ...]:
        return tuple(part.id for part in self._services.values() if part.service == service)


def _without_secrets(url: str) -> str:
    """A store's URL as others may see it: user and password stay out."""
    split = urlsplit(url)
    host = split.netloc.rpartition("@")[2]
    return split._replace(netloc=host, query="").geturl()
