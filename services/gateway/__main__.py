"""The gateway's process: builds everything, serves, and drains on SIGTERM."""

from __future__ import annotations

import asyncio
import random
import sys
from dataclasses import dataclass, replace
from functools import partial

import uvloop
from interlock.http.v1 import http_service_pb2_grpc
from interlock.v1 import gateway_service_pb2_grpc

from services.common import announce, config, heap, ids, logs, metrics, redis_client, server, trust
from services.common.clock import Clock
from services.common.interceptors import TokenFirst
from services.common.system_clock import SystemClock
from services.common.threads import let_helpers_give_way
from services.common.tokens import SecretWeak
from services.common.trust import Trust
from services.gateway.adapters.breakers import Breakers
from services.gateway.adapters.controller_link import ControllerLink, Membership
from services.gateway.adapters.counted_workers import CountedWorkerPool
from services.gateway.adapters.fallback_queue import FallbackJobQueue
from services.gateway.adapters.grpc_worker import GrpcWorkerPool
from services.gateway.adapters.guarded_directory import GuardedRequestDirectory
from services.gateway.adapters.guarded_workers import GuardedWorkerPool
from services.gateway.adapters.prometheus_meter import GatewayCollector, PrometheusMeter
from services.gateway.adapters.redis_directory import RedisRequestDirectory
from services.gateway.adapters.redis_fleet import RedisFleet
from services.gateway.adapters.redis_log import RedisGenerationLog
from services.gateway.adapters.redis_queue import RedisJobQueue
from services.gateway.adapters.standby import Standby
from services.gateway.config import GatewayConfig
from services.gateway.core.catalog import Catalog
from services.gateway.core.ports import GenerationLog, Meter, RequestDirectory, SharedQueue, WorkerPool
from services.gateway.core.queue_limits import QueueLimits
from services.gateway.core.readiness import Readiness
from services.gateway.core.retry import RetryBudget
from services.gateway.core.tallies import Tallies
from services.gateway.core.tenancy import TenantBounds, TenantLimits
from services.gateway.dispatcher.dispatch import Dispatcher, DispatcherLimits
from services.gateway.dispatcher.limits import GenerationLimits
from services.gateway.dispatcher.reception import DeadlineLimits, Reception
from services.gateway.dispatcher.resumption import Resumption, ResumptionLimits
from services.gateway.dispatcher.usage import UsageDesk
from services.gateway.http.servicer import GatewayHttpServicer
from services.gateway.servicer import GatewayServicer

SERVICES = ("interlock.v1.GatewayService", "interlock.http.v1.GatewayHttpService")

# After the drain only probes and refused calls are left.
STOP_GRACE_S = 1.0
# What ends the last streams comes before the server cuts them off.
LEAVE_GRACE_S = 5.0
# How often health looks whether a request could be answered.
HEALTH_LOOK_S = 0.2


async def run(
    settings: GatewayConfig,
    *,
    queue: SharedQueue | None = None,
    logs_of: tuple[GenerationLog, RequestDirectory] | None = None,
    clock: Clock | None = None,
    wait: server.Wait = server.run_until_signal,
) -> None:
    """Serves until `wait` returns; it is given what drains the gateway.

    Args:
        settings: What the process was told.
        queue: The queue; None: Redis, by the settings.
        logs_of: Logs and directory of requests; they come with `queue`.
        clock: The time; None: the machine's.
        wait: Returns when the server shall end, after it has run its argument.

    Raises:
        ConfigInvalid: The URL of Redis is of no known form, no key for tokens can be used, or a controller is
            of two meshes.
        PortTaken: The address cannot be bound.
        SecretWeak: The JWT secret is too short.
    """
    clock = clock or SystemClock()
    catalog, breakers = Catalog(settings.aliases), Breakers(clock)
    if queue is not None and logs_of is not None:
        outside = _Store(queue, *logs_of)
        await _serve(settings, outside, trust.build(settings, clock, None), catalog, breakers, clock, wait)
        return
    store = redis_client.connect(settings.redis_url.get_secret_value())
    limits = QueueLimits(
        waiting_jobs_max=settings.queue_jobs_max,
        tenant_waiting_jobs_max=settings.tenant_queue_jobs_max,
        aging_s=settings.queue_aging_s,
        failover_wait_s=settings.failover_wait_s,
        resume_ttl_s=settings.resume_ttl_s,
    )
    standby = Standby(clock, limits, catalog.activated, breakers.opened)
    redis_queue = RedisJobQueue(store, settings.id, limits, standby.serves)
    redis_log = RedisGenerationLog(store, settings.id, limits, standby.serves)
    fallback = FallbackJobQueue(redis_queue, standby, breakers.store, clock)
    fleet = RedisFleet(store, settings.id, lambda: catalog.models, standby, breakers)
    directory = GuardedRequestDirectory(RedisRequestDirectory(store), breakers.store)
    outside = _Store(fallback, redis_log, directory, fleet)
    try:
        await redis_queue.start()
        await _serve(settings, outside, trust.build(settings, clock, store), catalog, breakers, clock, wait)
    finally:
        await redis_queue.close()
        await store.close()


@dataclass(frozen=True, slots=True)
class _Store:
    """What the gateway keeps outside itself."""

    queue: SharedQueue
    log: GenerationLog
    directory: RequestDirectory
    fleet: RedisFleet | None = None


async def _serve(
    settings: GatewayConfig,
    store: _Store,
    tokens: Trust,
    catalog: Catalog,
    breakers: Breakers,
    clock: Clock,
    wait: server.Wait,
) -> None:
    await tokens.load()
    breakers.use_board(store.queue)
    pool = _pool(settings, clock)
    tallies = Tallies()
    counted = CountedWorkerPool(pool, tallies, clock)
    workers = GuardedWorkerPool(counted, breakers, RetryBudget(), clock)
    meter = PrometheusMeter()
    dispatcher = _dispatcher(settings, store, workers, clock, catalog, meter)
    reception = Reception(
        tokens.verifier,
        catalog,
        dispatcher,
        DeadlineLimits(settings.deadline_default_s, settings.deadline_max_s),
        clock,
        meter=meter,
        tenants=_tenants(settings),
    )
    token_first = TokenFirst(tokens.verifier.believes, tuple(f"/{service}/" for service in SERVICES))
    serving = server.create(SERVICES, clock, interceptors=(*tokens.interceptors, token_first))
    address = serving.bind(settings.bind)
    link, *further = _links(settings, address, catalog, tallies)
    readiness = Readiness(
        attached=lambda: link.attached_once,
        model_known=lambda: bool(catalog.default),
        store_reachable=lambda: dispatcher.store_reachable,
    )
    gateway_service_pb2_grpc.add_GatewayServiceServicer_to_server(
        GatewayServicer(reception, UsageDesk(store.queue, catalog, clock)), serving.grpc_server
    )
    http_service_pb2_grpc.add_GatewayHttpServiceServicer_to_server(
        GatewayHttpServicer(reception, readiness), serving.grpc_server
    )
    # The library's health servicer starts out with SERVING.
    await serving.start()
    let_helpers_give_way()
    exposition = metrics.expose(
        settings.metrics_bind,
        GatewayCollector(
            lambda: dispatcher.live,
            lambda: reception.prompts_waiting,
            lambda: dispatcher.store_reachable,
            breakers.reports,
        ),
    )
    announce.write(settings.announce_file, id=settings.id, address=address, metrics=exposition.address)
    logs.get_logger().info("process.started", address=address)
    work = [
        asyncio.create_task(link.run(), name="gateway.link"),
        asyncio.create_task(dispatcher.run(), name="gateway.dispatcher"),
        asyncio.create_task(tokens.run(), name="gateway.trust"),
        asyncio.create_task(_tell_health(serving, readiness), name="gateway.health"),
    ]
    work += [asyncio.create_task(other.run(), name="gateway.further-link") for other in further]
    if store.fleet is not None:
        work.append(asyncio.create_task(store.fleet.run(), name="gateway.fleet"))

    try:
        await wait(partial(_drain, settings, serving, readiness, reception, dispatcher))
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        await serving.grpc_server.stop(None)
        await pool.close()
        await breakers.close()
        exposition.close()


async def _drain(
    settings: GatewayConfig,
    serving: server.Server,
    readiness: Readiness,
    reception: Reception,
    dispatcher: Dispatcher,
) -> None:
    """Lets what runs end and be read, within the grace; whatever comes is refused."""
    readiness.draining = True
    await serving.set_serving(False)
    # Whoever probes learns it before the first call is refused.
    await asyncio.sleep(settings.drain_notice_s)
    reception.drain()
    # GOAWAY: connections take no new call, and what runs on them goes on.
    leaving = asyncio.create_task(serving.grpc_server.stop(settings.drain_grace_s + LEAVE_GRACE_S))
    now_s = asyncio.get_running_loop().time
    until_s = now_s() + settings.drain_grace_s
    await dispatcher.drain(settings.drain_grace_s)
    # Requests have ended whose answers are still written: large ones, or to clients who read slowly.
    await serving.calls.wait_none(until_s - now_s())
    await serving.grpc_server.stop(STOP_GRACE_S)
    await leaving


def _pool(settings: GatewayConfig, clock: Clock) -> GrpcWorkerPool:
    return GrpcWorkerPool(
        settings.id,
        settings.mesh_token.get_secret_value(),
        clock,
        silence_s=settings.worker_silence_s,
        stall_s=settings.worker_stall_s,
        events_per_s=settings.events_per_s,
    )


def _dispatcher(
    settings: GatewayConfig,
    store: _Store,
    workers: WorkerPool,
    clock: Clock,
    catalog: Catalog,
    meter: Meter,
) -> Dispatcher:
    limits = ResumptionLimits(
        followers_max=settings.requests_max,
        client_stall_s=settings.client_stall_s,
        resume_ttl_s=settings.resume_ttl_s,
    )
    return Dispatcher(
        store.queue,
        workers,
        clock,
        Resumption(store.log, store.directory, clock, catalog.tokenizer, limits),
        models=lambda: catalog.models,
        is_replaced=catalog.is_replaced,
        is_own=catalog.is_own,
        meter=meter,
        # Spreads the gateways' reaping in time; nothing is guarded by it.
        jitter=random.random,
        limits=DispatcherLimits(requests_max=settings.requests_max, worker_wait_s=settings.failover_wait_s),
        generation_limits=GenerationLimits(
            credit_tokens=settings.credit_tokens,
            client_stall_s=settings.client_stall_s,
            attempts_max=settings.attempts_max,
            failover_wait_s=settings.failover_wait_s,
            detach_grace_s=settings.detach_grace_s,
        ),
    )


def _tenants(settings: GatewayConfig) -> TenantBounds:
    return TenantBounds(
        most=TenantLimits(
            settings.tenant_tokens_per_minute_max, settings.tenant_concurrency_max, settings.tenant_weight_max
        ),
        default=TenantLimits(
            settings.tenant_tokens_per_minute_default,
            settings.tenant_concurrency_default,
            settings.tenant_weight_default,
        ),
    )


def _links(settings: GatewayConfig, address: str, catalog: Catalog, tallies: Tallies) -> list[ControllerLink]:
    """The link to the controllers of the mesh, and to those of the one that it falls back to.

    Raises:
        ConfigInvalid: A controller is of both.
    """
    if both := set(settings.controllers) & set(settings.fallback_controllers):
        # It would take the two links for the same member, which attaches again and again.
        raise config.ConfigInvalid(f"fallback_controllers: {min(both)} is one of this mesh's controllers.")
    member = Membership(
        gateway_id=settings.id,
        incarnation=ids.new_incarnation(),
        address=address,
        mesh_token=settings.mesh_token.get_secret_value(),
        controllers=settings.controllers,
        cache_dir=settings.cache_dir,
    )
    links = [ControllerLink(member, catalog, tallies)]
    if settings.fallback_controllers:
        other = replace(member, controllers=settings.fallback_controllers)
        links.append(ControllerLink(other, catalog, tallies, secondary=True))
    return links


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
    heap.settle()
    try:
        # The loop meets gRPC and Redis a dozen times a request; uvloop does so in C.
        uvloop.run(run(settings))
    except (SecretWeak, config.ConfigInvalid, metrics.MetricsPortTaken, server.PortTaken) as error:
        print(f"gateway: {error}", file=sys.stderr)  # noqa: T201 - told before any log is read
        sys.exit(2)


if __name__ == "__main__":
    main()
