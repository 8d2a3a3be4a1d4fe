"""The controller's process: builds everything, serves, and drains on SIGTERM."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

from interlock.http.v1 import http_service_pb2_grpc
from interlock.v1 import controller_service_pb2_grpc

from services.common import announce, config, heap, logs, metrics, redis_client, server, trust
from services.common.clock import Clock
from services.common.errors import ArtifactInvalid, NotLeader
from services.common.ids import new_incarnation
from services.common.interceptors import MeshOnly, TokenFirst
from services.common.system_clock import SystemClock
from services.common.tokens import SecretWeak
from services.common.trust import Trust
from services.controller import http_servicer, servicer
from services.controller.adapters.artifact_home import ArtifactHome
from services.controller.adapters.artifact_store import ArtifactStore
from services.controller.adapters.file_rollouts import FileRolloutRecords
from services.controller.adapters.first_revision import FirstRevision
from services.controller.adapters.mirrored_rollouts import MirroredRolloutRecords
from services.controller.adapters.prometheus_controller import ControllerCollector
from services.controller.adapters.redis_breakers import RedisBreakerFleet
from services.controller.adapters.redis_lead import RedisLead
from services.controller.adapters.redis_route import RedisRouteStore
from services.controller.adapters.uploads import Uploads
from services.controller.config import ControllerConfig
from services.controller.coordinator import Coordinator, Leadership, Tenure
from services.controller.core.catalog import Catalog, Revision
from services.controller.core.ports import BreakerFleet, FenceStale, Lead, RouteStore

# Streams end at once and admin calls within milliseconds; nothing is worth a longer wait.
STOP_GRACE_S = 2.0


async def run(
    settings: ControllerConfig,
    *,
    store: RouteStore | None = None,
    lead: Lead | None = None,
    breakers: BreakerFleet | None = None,
    clock: Clock | None = None,
    wait: server.Wait = server.run_until_signal,
) -> None:
    """Serves until `wait` returns; it is given what drains the controller.

    Args:
        settings: What the process was told.
        store: The route store; None: Redis, by the settings.
        lead: The lease by which one controller leads; None: in Redis, by the settings.
        breakers: The gateways' breakers; None: in Redis, by the settings.
        clock: The time; None: the machine's.
        wait: Returns when the server shall end, after it has run its argument.

    Raises:
        ArtifactInvalid: The model's directory cannot be served.
        ConfigInvalid: A URL is of no known form, or needs a package that is missing, or no key for tokens can
            be used.
        PortTaken: The address cannot be bound.
        SecretWeak: The JWT secret is too short.
    """
    clock = clock or SystemClock()
    home = _home(settings)
    redis = redis_client.connect(settings.redis_url.get_secret_value())
    try:
        tokens = trust.build(settings, clock, redis if store is None else None)
        world = _World(
            store or RedisRouteStore(redis),
            lead
            or RedisLead(
                redis, settings.model_name, settings.id, new_incarnation(), ttl_s=settings.lead_ttl_s
            ),
            breakers or RedisBreakerFleet(redis),
            clock,
            home,
        )
        await _serve(settings, world, tokens, wait)
    finally:
        await redis.close()


@dataclass(frozen=True, slots=True)
class _World:
    """What the controller stands on."""

    store: RouteStore
    lead: Lead
    breakers: BreakerFleet
    clock: Clock
    home: ArtifactHome | None


def _home(settings: ControllerConfig) -> ArtifactHome | None:
    """Where uploaded revisions are kept, if not on this machine alone."""
    url = settings.artifacts_url.get_secret_value()
    return ArtifactHome(ArtifactStore(url), settings.model_name) if url else None


async def _begin(
    settings: ControllerConfig, first: Revision, world: _World, tenure: Tenure
) -> servicer.ControllerTerm:
    """What exists while we lead; what another controller took in meanwhile is on disk."""
    catalog = Catalog()
    catalog.register(first)

    async def still_leading() -> None:
        try:
            await tenure.keep()
        except FenceStale:
            raise NotLeader("Another controller leads; ask again.") from None

    uploads = Uploads(
        catalog,
        settings.data_dir,
        world.clock,
        bytes_max=settings.uploads_bytes,
        still_leading=still_leading,
        home=world.home,
    )
    await uploads.load()
    local = FileRolloutRecords(settings.data_dir / "rollouts")
    records = local if world.home is None else MirroredRolloutRecords(local, world.home, tenure.keep)
    coordinator = Coordinator(
        catalog,
        world.store,
        records,
        world.clock,
        tenure,
        lease_ttl_s=settings.lease_ttl_s,
        prepare_timeout_s=settings.prepare_timeout_s,
    )
    return servicer.ControllerTerm(coordinator, catalog, uploads.files, uploads, records)


async def _lead(leadership: Leadership[servicer.ControllerTerm], first: FirstRevision) -> None:
    """Leads whenever it may. Before it knows its model the lead would be of no use to anybody."""
    await first.read()
    await leadership.run()


async def _serve(settings: ControllerConfig, world: _World, tokens: Trust, wait: server.Wait) -> None:
    await tokens.load()
    mesh_only = MeshOnly(settings.mesh_token.get_secret_value(), servicer.MESH_METHODS)
    token_first = TokenFirst(
        lambda metadata: tokens.verifier.believes(metadata, "admin"),
        (*servicer.ADMIN_METHODS, f"/{http_servicer.SERVICE}/"),
    )
    serving = server.create(
        (servicer.SERVICE, http_servicer.SERVICE),
        world.clock,
        interceptors=[mesh_only, *tokens.interceptors, token_first],
    )
    first = FirstRevision(settings, world.clock)
    leadership = Leadership(
        world.lead,
        lambda tenure: _begin(settings, first.revision, world, tenure),
        world.clock,
        ttl_s=settings.lead_ttl_s,
        on_change=serving.set_serving,
    )
    leadership.refuse("The controller reads its model and does not lead yet; ask again.")
    service = servicer.ControllerServicer(
        leadership, tokens.verifier, world.clock, tokens.revocations, world.breakers
    )
    controller_service_pb2_grpc.add_ControllerServiceServicer_to_server(service, serving.grpc_server)
    http_service_pb2_grpc.add_AdminHttpServiceServicer_to_server(
        http_servicer.AdminHttpServicer(service, tokens.verifier), serving.grpc_server
    )
    address = serving.bind(settings.bind)
    await serving.start()
    numbers = ControllerCollector(lambda: leadership.term.coordinator, world.clock)
    exposition = metrics.expose(settings.metrics_bind, numbers)
    announce.write(settings.announce_file, id=settings.id, address=address, metrics=exposition.address)
    logs.get_logger().info("process.started", address=address)
    leading = asyncio.create_task(_lead(leadership, first), name="controller.leadership")
    trusting = asyncio.create_task(tokens.run(), name="controller.trust")

    async def drain() -> None:
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)
        await leadership.leave()
        await serving.grpc_server.stop(STOP_GRACE_S)

    waiting = asyncio.ensure_future(wait(drain))
    tasks: tuple[asyncio.Future[None], ...] = (waiting, leading, trusting)
    try:
        # A leadership that ends by itself has a defect, or a model that cannot be served: the process ends
        # with it and is started again.
        await asyncio.wait({waiting, leading}, return_when=asyncio.FIRST_COMPLETED)
        if leading.done() and not leading.cancelled():
            leading.result()
        await waiting
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await serving.grpc_server.stop(None)
        exposition.close()


def main() -> None:
    """Runs the controller until SIGTERM; ends with 2 when its settings cannot be used."""
    settings = config.from_command_line(ControllerConfig, "controller")
    logs.configure("controller", settings.id, level=settings.log_level)
    heap.settle()
    try:
        asyncio.run(run(settings))
    except (
        ArtifactInvalid,
        SecretWeak,
        config.ConfigInvalid,
        metrics.MetricsPortTaken,
        server.PortTaken,
    ) as error:
        print(f"controller: {error}", file=sys.stderr)  # noqa: T201 - told before any log is read
        sys.exit(2)


if __name__ == "__main__":
    main()
