"""What operators see. Owns: how revisions, models and workers become messages of the contract."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from google.protobuf.timestamp_pb2 import Timestamp
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import model_pb2, worker_pb2

from services.common.clock import Clock
from services.controller.adapters.member_messages import QUANTIZATIONS, STEPS, manifest_message
from services.controller.core.catalog import Catalog, Revision
from services.controller.core.member import Member, Presence
from services.controller.core.residency import Phase, Resident
from services.controller.core.routing import Plan

_STEP_PHASES = MappingProxyType({step: phase for phase, step in STEPS.items()})

_SHOWN_PHASES: Mapping[Phase, worker_pb2.RevisionPhase.ValueType] = MappingProxyType(
    {
        Phase.STAGED: worker_pb2.REVISION_PHASE_STAGED,
        Phase.READY: worker_pb2.REVISION_PHASE_READY,
        Phase.ACTIVATING: worker_pb2.REVISION_PHASE_READY,
        Phase.ACTIVE: worker_pb2.REVISION_PHASE_ACTIVE,
        Phase.RETIRING: worker_pb2.REVISION_PHASE_RETIRING,
        Phase.FAILED: worker_pb2.REVISION_PHASE_FAILED,
    }
)


def models_message(
    catalog: Catalog, workers: Iterable[Member], plan: Plan | None
) -> pb.ControllerServiceListModelsResponse:
    """Every model, by name."""
    present = tuple(workers)
    default = catalog.default_model()
    return pb.ControllerServiceListModelsResponse(
        models=[
            _model_message(catalog, name, present, plan, default=name == default) for name in catalog.models()
        ]
    )


def workers_message(workers: Iterable[Member], model: str, clock: Clock) -> pb.ListWorkersResponse:
    """Every worker, by id."""
    return pb.ListWorkersResponse(workers=[worker_message(worker, model, clock) for worker in workers])


def revision_message(revision: Revision, workers: Iterable[Member], plan: Plan | None) -> model_pb2.Revision:
    """A revision as operators see it; where its files lie is nobody's business but the members'."""
    name = revision.manifest.revision
    message = model_pb2.Revision(
        manifest=manifest_message(revision),
        create_time=_timestamp(revision.create_time_s),
        weight=plan.weights.get(name, 0) if plan else 0,
        ready_workers=_count_ready(workers, name),
    )
    message.manifest.ClearField("local_path")
    return message


def worker_message(member: Member, model: str, clock: Clock) -> worker_pb2.Worker:
    """A worker as operators see it."""
    # Members are kept on the monotonic clock; people read the other one.
    offset_s = clock.now() - clock.monotonic()
    return worker_pb2.Worker(
        id=member.id,
        address=member.address,
        incarnation=member.incarnation,
        state=_state(member),
        devices=[
            worker_pb2.Device(kind=device.kind, name=device.name, memory_bytes=device.memory_bytes)
            for device in member.devices
        ],
        revisions=[
            _resident_message(model, name, resident) for name, resident in sorted(member.residents.items())
        ],
        load=worker_pb2.WorkerLoad(
            running=member.load.running,
            slots=member.slots,
            memory_bytes=member.load.memory_bytes,
            steps=member.load.steps,
            generated_tokens=member.load.generated_tokens,
        ),
        attach_time=_timestamp(member.attached_s + offset_s),
        lease_end_time=_timestamp(member.lease_end_s + offset_s),
    )


def _model_message(
    catalog: Catalog, model: str, workers: Iterable[Member], plan: Plan | None, *, default: bool
) -> model_pb2.Model:
    weights = plan.weights if plan else {}
    routed = max(weights, key=lambda name: weights[name], default="")
    ready_workers = _count_ready(workers, routed)
    # Before anything is routed it is told of what shall be.
    shown = routed if catalog.knows(model, routed) else catalog.wanted(model)
    manifest = catalog.revision(model, shown).manifest
    return model_pb2.Model(
        name=model,
        revision=routed if ready_workers else "",
        context_tokens=manifest.context_tokens,
        quantization=QUANTIZATIONS[manifest.quantization],
        ready_workers=ready_workers,
        is_default=default,
    )


def _count_ready(workers: Iterable[Member], revision: str) -> int:
    listings = [worker.listing for worker in workers]
    return sum(
        1 for listing in listings if listing and not listing.draining and revision in listing.revisions
    )


def _state(member: Member) -> worker_pb2.WorkerState.ValueType:
    if member.presence is not Presence.ATTACHED:
        return worker_pb2.WORKER_STATE_LOST
    if member.draining:
        return worker_pb2.WORKER_STATE_DRAINING
    return worker_pb2.WORKER_STATE_SERVING if member.active_revisions else worker_pb2.WORKER_STATE_PREPARING


def resident_phase(resident: Resident) -> worker_pb2.RevisionPhase.ValueType:
    """Where a revision is inside a member, in the contract's words."""
    preparing = _STEP_PHASES.get(resident.step, worker_pb2.REVISION_PHASE_FETCH)
    return _SHOWN_PHASES.get(resident.phase, preparing)


def _resident_message(model: str, revision: str, resident: Resident) -> worker_pb2.ResidentRevision:
    return worker_pb2.ResidentRevision(
        model=model,
        revision=revision,
        phase=resident_phase(resident),
        weights_bytes=resident.weights_bytes,
        failure=resident.failure,
    )


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMilliseconds(round(seconds * 1000))
    return stamp
