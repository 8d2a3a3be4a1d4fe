"""The controller's process: builds everything, serves, and drains on SIGTERM."""

from __future__ import annotations

import asyncio
import sys

from interlock.http.v1 import http_service_pb2_grpc
from interlock.v1 import controller_service_pb2_grpc

from services.common import announce, config, logs, metrics, redis_client, server, trust
from services.common.clock import Clock
from services.common.errors import ArtifactInvalid
from services.common.interceptors import MeshOnly
from services.common.system_clock import SystemClock
from services.common.tokens import SecretWeak
from services.common.trust import Trust
from services.controller import http_servicer, servicer
from services.controller.adapters.file_rollouts import FileRolloutRecords
from services.controller.adapters.local_revisions import LocalRevisionFiles, read_revision
from services.controller.adapters.redis_breakers import RedisBreakerFleet
from services.controller.adapters.redis_route import RedisRouteStore
from services.controller.adapters.uploads import Uploads
from services.controller.config import ControllerConfig
from services.controller.coordinator import Coordinator
from services.controller.core.catalog import Catalog
from services.controller.core.ports import BreakerFleet, RouteStore

# Streams end at once and admin calls within milliseconds; nothing is worth a longer wait.
STOP_GRACE_S = 2.0


async def run(
    settings: ControllerConfig,
    *,
    store: RouteStore | None = None,
    breakers: BreakerFleet | None = None,
    clock: Clock | None = None,
    wait: server.Wait = server.run_until_signal,
) -> None:
    """Serves until `wait` returns; it is given what drains the controller.

    Args:
        settings: What the process was told.
        store: The route store; None: Redis, by the settings.
        breakers: The gateways' breakers; None: in Redis, by the settings.
        clock: The time; None: the machine's.
        wait: Returns when the server shall end, after it has run its argument.

    Raises:
        ArtifactInvalid: The model's directory cannot be served.
        ConfigInvalid: The URL of Redis is of no known form, or no key for tokens can be used.
        PortTaken: The address cannot be bound.
        SecretWeak: The JWT secret is too short.
    """
    clock = clock or SystemClock()
    redis = redis_client.connect(settings.redis_url.get_secret_value())
    try:
        tokens = trust.build(settings, clock, redis if store is None else None)
        catalog = await _register(settings, clock)
        uploads = Uploads(catalog, settings.data_dir, clock, bytes_max=settings.uploads_bytes)
        await uploads.load()
        coordinator = Coordinator(
            catalog,
            store or RedisRouteStore(redis),
            FileRolloutRecords(settings.data_dir / "rollouts"),
            clock,
            lease_ttl_s=settings.lease_ttl_s,
            prepare_timeout_s=settings.prepare_timeout_s,
        )
        shown = breakers or RedisBreakerFleet(redis)
        await _serve(settings, coordinator, catalog, tokens, shown, uploads, clock, wait)
    finally:
        await redis.close()


async def _register(settings: ControllerConfig, clock: Clock) -> Catalog:
    revision = await asyncio.to_thread(
        read_revision,
        settings.model_path,
        model=settings.model_name,
        quantization=settings.quantization,
        compute_dtype=settings.compute_dtype,
        context_tokens=settings.context_tokens,
        now_s=clock.now(),
    )
    catalog = Catalog()
    catalog.register(revision)
    manifest = revision.manifest
    logs.get_logger().info(
        "revision.registered", model=manifest.model, revision=manifest.revision, files=len(manifest.files)
    )
    return catalog


async def _serve(
    settings: ControllerConfig,
    coordinator: Coordinator,
    catalog: Catalog,
    tokens: Trust,
    breakers: BreakerFleet,
    uploads: Uploads,
    clock: Clock,
    wait: server.Wait,
) -> None:
    await tokens.load()
    mesh_only = MeshOnly(settings.mesh_token.get_secret_value(), servicer.MESH_METHODS)
    serving = server.create(
        (servicer.SERVICE, http_servicer.SERVICE), clock, interceptors=[mesh_only, *tokens.interceptors]
    )
    service = servicer.ControllerServicer(
        coordinator,
        catalog,
        LocalRevisionFiles(catalog),
        tokens.verifier,
        clock,
        tokens.revocations,
        breakers,
        uploads,
    )
    controller_service_pb2_grpc.add_ControllerServiceServicer_to_server(service, serving.grpc_server)
    http_service_pb2_grpc.add_AdminHttpServiceServicer_to_server(
        http_servicer.AdminHttpServicer(service, tokens.verifier), serving.grpc_server
    )
    address = serving.bind(settings.bind)
    await serving.start()
    exposition = metrics.expose(settings.metrics_bind)
    announce.write(settings.announce_file, id=settings.id, address=address, metrics=exposition.address)
    logs.get_logger().info("process.started", address=address)
    leading = asyncio.create_task(coordinator.run(), name="controller.coordinator")
    telling = asyncio.create_task(_tell_health(serving, coordinator), name="controller.health")
    trusting = asyncio.create_task(tokens.run(), name="controller.trust")

    async def drain() -> None:
        telling.cancel()
        await serving.set_serving(False)
        coordinator.close("The controller is shutting down.")
        await serving.grpc_server.stop(STOP_GRACE_S)

    waiting = asyncio.ensure_future(wait(drain))
    tasks: tuple[asyncio.Future[None], ...] = (waiting, leading, telling, trusting)
    try:
        # A coordinator that ends by itself has a defect; the process ends with it and is started again.
        ended, _ = await asyncio.wait({waiting, leading}, return_when=asyncio.FIRST_COMPLETED)
        for one in ended:
            one.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await serving.grpc_server.stop(None)
        exposition.close()


async def _tell_health(serving: server.Server, coordinator: Coordinator) -> None:
    """Lets health follow whether we lead."""
    await coordinator.led.wait()
    await serving.set_serving(True)
    await coordinator.deposed.wait()
    await serving.set_serving(False)


def main() -> None:
    """Runs the controller until SIGTERM; ends with 2 when its settings cannot be used."""
    settings = config.from_command_line(ControllerConfig, "controller")
    logs.configure("controller", settings.id, level=settings.log_level)
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
