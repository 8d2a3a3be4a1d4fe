"""The gateway's process: builds everything, serves, and drains on SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import random
import sys

import uvloop
from interlock.http.v1 import http_service_pb2_grpc
from interlock.v1 import gateway_service_pb2_grpc

from services.common import announce, config, ids, logs, redis_client, server
from services.common.clock import Clock
from services.common.system_clock import SystemClock
from services.common.token_cache import TokenCache
from services.common.tokens import SecretWeak, TokenVerifier
from services.gateway.adapters.controller_link import ControllerLink, Membership
from services.gateway.adapters.grpc_worker import GrpcWorkerPool
from services.gateway.adapters.redis_queue import RedisJobQueue
from services.gateway.config import GatewayConfig
from services.gateway.core.catalog import Catalog
from services.gateway.core.ports import JobQueue
from services.gateway.core.queue_limits import QueueLimits
from services.gateway.core.readiness import Readiness
from services.gateway.dispatcher.dispatch import Dispatcher, DispatcherLimits
from services.gateway.dispatcher.generation import GenerationLimits
from services.gateway.dispatcher.reception import DeadlineLimits, Reception
from services.gateway.http.servicer import GatewayHttpServicer
from services.gateway.servicer import GatewayServicer

SERVICES = ("interlock.v1.GatewayService", "interlock.http.v1.GatewayHttpService")

# After the drain only probes and refused calls are left.
STOP_GRACE_S = 1.0
# A request makes a few hundred objects, most of which end with it: Python's default would look through them
# with every other request, for a tenth of the processor's time.
GC_THRESHOLDS = (50_000, 20, 50)
# How often health looks whether a request could be answered.
HEALTH_LOOK_S = 0.2


async def run(
    settings: GatewayConfig,
    *,
    queue: JobQueue | None = None,
    clock: Clock | None = None,
    wait: server.Wait = server.run_until_signal,
) -> None:
    """Serves until `wait` returns; it is given what drains the gateway.

    Args:
        settings: What the process was told.
        queue: The queue; None: Redis, by the settings.
        clock: The time; None: the machine's.
        wait: Returns when the server shall end, after it has run its argument.

    Raises:
        ConfigInvalid: The URL of Redis is of no known form.
        PortTaken: The address cannot be bound.
        SecretWeak: The JWT secret is too short.
    """
    clock = clock or SystemClock()
    if queue is not None:
        await _serve(settings, queue, clock, wait)
        return
    store = redis_client.connect(settings.redis_url.get_secret_value())
    limits = QueueLimits(waiting_jobs_max=settings.queue_jobs_max, failover_wait_s=settings.failover_wait_s)
    redis_queue = RedisJobQueue(store, settings.id, limits)
    try:
        await redis_queue.start()
        await _serve(settings, redis_queue, clock, wait)
    finally:
        await redis_queue.close()
        await store.close()


async def _serve(settings: GatewayConfig, queue: JobQueue, clock: Clock, wait: server.Wait) -> None:
    catalog = Catalog()
    workers = GrpcWorkerPool(settings.id, settings.mesh_token.get_secret_value(), clock)
    dispatcher = _dispatcher(settings, queue, workers, clock, catalog)
    reception = Reception(
        TokenCache(_verifier(settings, clock), clock.now),
        catalog,
        dispatcher,
        DeadlineLimits(settings.deadline_default_s, settings.deadline_max_s),
    )
    serving = server.create(SERVICES, clock)
    address = serving.bind(settings.bind)
    link = ControllerLink(_membership(settings, address), catalog)
    readiness = Readiness(
        attached=lambda: link.attached_once,
        model_known=lambda: bool(catalog.models),
        store_reachable=lambda: dispatcher.store_reachable,
    )
    gateway_service_pb2_grpc.add_GatewayServiceServicer_to_server(
        GatewayServicer(reception), serving.grpc_server
    )
    http_service_pb2_grpc.add_GatewayHttpServiceServicer_to_server(
        GatewayHttpServicer(reception, readiness), serving.grpc_server
    )
    # The library's health servicer starts out with SERVING.
    await serving.start()
    announce.write(settings.announce_file, id=settings.id, address=address)
    logs.get_logger().info("process.started", address=address)
    work = [
        asyncio.create_task(link.run(), name="gateway.link"),
        asyncio.create_task(dispatcher.run(), name="gateway.dispatcher"),
        asyncio.create_task(_tell_health(serving, readiness), name="gateway.health"),
    ]

    async def drain() -> None:
        readiness.draining = True
        await serving.set_serving(False)
        reception.drain()
        await dispatcher.drain(settings.drain_grace_s)
        await serving.grpc_server.stop(STOP_GRACE_S)

    try:
        await wait(drain)
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        await serving.grpc_server.stop(None)
        await workers.close()


def _dispatcher(
    settings: GatewayConfig, queue: JobQueue, workers: GrpcWorkerPool, clock: Clock, catalog: Catalog
) -> Dispatcher:
    return Dispatcher(
        queue,
        workers,
        clock,
        models=lambda: catalog.models,
        # Spreads the gateways' reaping in time; nothing is guarded by it.
        jitter=random.random,
        limits=DispatcherLimits(requests_max=settings.requests_max, worker_wait_s=settings.failover_wait_s),
        generation_limits=GenerationLimits(
            credit_tokens=settings.credit_tokens,
            client_stall_s=settings.client_stall_s,
            attempts_max=settings.attempts_max,
            failover_wait_s=settings.failover_wait_s,
        ),
    )


def _verifier(settings: GatewayConfig, clock: Clock) -> TokenVerifier:
    return TokenVerifier(
        settings.jwt_secret.get_secret_value(),
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
        lifetime_max_s=settings.jwt_lifetime_max_s,
        leeway_s=settings.jwt_leeway_s,
        now=clock.now,
    )


def _membership(settings: GatewayConfig, address: str) -> Membership:
    return Membership(
        gateway_id=settings.id,
        incarnation=ids.new_incarnation(),
        address=address,
        mesh_token=settings.mesh_token.get_secret_value(),
        controllers=settings.controllers,
        cache_dir=settings.cache_dir,
    )


async def _tell_health(serving: server.Server, readiness: Readiness) -> None:
    """Keeps health at whether a request could be answered."""
    told = False
    while True:
        ready = readiness.obstacle() is None
        # Once it drains, health has been told, and stays so.
        if ready is not told and not readiness.draining:
            told = ready
            await serving.set_serving(ready)
        await asyncio.sleep(HEALTH_LOOK_S)


def main() -> None:
    """Runs the gateway until SIGTERM; ends with 2 when its settings cannot be used."""
    settings = config.from_command_line(GatewayConfig, "gateway")
    logs.configure("gateway", settings.id, level=settings.log_level)
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        # It takes a fifth of the processor's time off a request: where the loop meets gRPC and Redis.
        uvloop.run(run(settings))
    except (SecretWeak, config.ConfigInvalid, server.PortTaken) as error:
        print(f"gateway: {error}", file=sys.stderr)  # noqa: T201 - told before any log is read
        sys.exit(2)


if __name__ == "__main__":
    main()
