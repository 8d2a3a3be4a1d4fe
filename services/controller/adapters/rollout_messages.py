"""Rollouts as operators see them. Owns: how specs are read, and how records become messages."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import Literal

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from interlock.v1 import rollout_pb2 as pb
from interlock.v1 import worker_pb2

from services.common.errors import ArgumentInvalid
from services.controller.adapters.admin_messages import resident_phase
from services.controller.core.member import Member, Presence
from services.controller.core.residency import Resident
from services.controller.core.rollout_record import SHARE_ALL, Rollout, Spec, State, Strategy

_STRATEGIES = MappingProxyType(
    {
        pb.ROLLOUT_STRATEGY_UNSPECIFIED: Strategy.AUTO,
        pb.ROLLOUT_STRATEGY_AUTO: Strategy.AUTO,
        pb.ROLLOUT_STRATEGY_SIDE_BY_SIDE: Strategy.SIDE_BY_SIDE,
        pb.ROLLOUT_STRATEGY_SWAP: Strategy.SWAP,
    }
)
_STRATEGY_NUMBERS = MappingProxyType(
    {
        Strategy.AUTO: pb.ROLLOUT_STRATEGY_AUTO,
        Strategy.SIDE_BY_SIDE: pb.ROLLOUT_STRATEGY_SIDE_BY_SIDE,
        Strategy.SWAP: pb.ROLLOUT_STRATEGY_SWAP,
    }
)

# A judgement or a preparation of more than a day is a mistake in the unit.
DURATION_S_MAX = 86_400.0
# More than a fleet has; the core asks for as many as there are at most.
QUORUM_MAX = 10_000
# Who would let it be a hundred times as slow does not want it judged: that is 0.
TTFT_RATIO_MAX = 100


def read_spec(spec: pb.RolloutSpec) -> Spec:
    """What was asked for.

    Raises:
        ArgumentInvalid: A field is missing or out of its bounds.
    """
    for name, text in (("model", spec.model), ("revision", spec.revision)):
        if not text:
            raise ArgumentInvalid(f"spec.{name}: missing.")
    if spec.strategy not in _STRATEGIES:
        raise ArgumentInvalid("spec.strategy: must be auto, side by side, or swap.")
    percent = spec.canary_percent if spec.HasField("canary_percent") else SHARE_ALL
    if not 1 <= percent <= SHARE_ALL:
        raise ArgumentInvalid("spec.canary_percent: must be 1 to 100.")
    if percent < SHARE_ALL and _STRATEGIES[spec.strategy] is Strategy.SWAP:
        raise ArgumentInvalid(
            "spec.canary_percent: by swap a worker holds one revision, so the new one gets all requests."
            " Leave it out, or ask for side by side where memory holds both."
        )
    quorum = spec.quorum if spec.HasField("quorum") else None
    if quorum is not None and not 1 <= quorum <= QUORUM_MAX:
        raise ArgumentInvalid(f"spec.quorum: must be 1 to {QUORUM_MAX}.")
    failed = _bounded(spec, "failed_percent_max", 100)
    ratio = _bounded(spec, "ttft_ratio_max", TTFT_RATIO_MAX)
    plain = Spec(model=spec.model, revision=spec.revision)
    return Spec(
        model=spec.model,
        revision=spec.revision,
        strategy=_STRATEGIES[spec.strategy],
        canary_percent=percent,
        bake_s=_seconds("bake", spec.bake, least_s=0.0) if spec.HasField("bake") else plain.bake_s,
        quorum=quorum,
        prepare_timeout_s=_seconds("prepare_timeout", spec.prepare_timeout, least_s=1.0)
        if spec.HasField("prepare_timeout")
        else plain.prepare_timeout_s,
        drain_timeout_s=_seconds("drain_timeout", spec.drain_timeout, least_s=1.0)
        if spec.HasField("drain_timeout")
        else plain.drain_timeout_s,
        failed_percent_max=plain.failed_percent_max if failed is None else failed,
        ttft_ratio_max=plain.ttft_ratio_max if ratio is None else ratio,
    )


def rollout_message(rollout: Rollout, workers: Iterable[Member]) -> pb.Rollout:
    """A rollout and how far each worker is."""
    message = pb.Rollout(
        id=rollout.id,
        spec=_spec_message(rollout),
        previous_revision=rollout.previous,
        state=_state(rollout.state),
        history=[
            pb.RolloutTransition(state=_state(one.state), time=_timestamp(one.time_ms), cause=one.cause)
            for one in rollout.history
        ],
        paused=rollout.paused,
    )
    if not rollout.ended:
        message.workers.extend(
            _progress_message(worker, rollout.spec.revision)
            for worker in workers
            if worker.presence is Presence.ATTACHED
        )
    return message


def _spec_message(rollout: Rollout) -> pb.RolloutSpec:
    spec = rollout.spec
    message = pb.RolloutSpec(
        model=spec.model,
        revision=spec.revision,
        # Once it has begun, what `auto` has come to.
        strategy=_STRATEGY_NUMBERS[spec.strategy if rollout.strategy is Strategy.AUTO else rollout.strategy],
        canary_percent=spec.canary_percent,
        quorum=spec.quorum,
        failed_percent_max=spec.failed_percent_max,
        ttft_ratio_max=spec.ttft_ratio_max,
    )
    message.bake.FromMilliseconds(round(spec.bake_s * 1000))
    message.prepare_timeout.FromMilliseconds(round(spec.prepare_timeout_s * 1000))
    message.drain_timeout.FromMilliseconds(round(spec.drain_timeout_s * 1000))
    return message


def _progress_message(worker: Member, revision: str) -> pb.WorkerProgress:
    resident = worker.residents.get(revision)
    if resident is None:
        resident, phase = Resident(), worker_pb2.REVISION_PHASE_UNSPECIFIED
    else:
        phase = resident_phase(resident)
    return pb.WorkerProgress(
        worker_id=worker.id,
        phase=phase,
        done_bytes=resident.done_bytes,
        total_bytes=resident.total_bytes,
        failure=resident.failure,
    )


def _bounded(
    spec: pb.RolloutSpec, field: Literal["failed_percent_max", "ttft_ratio_max"], most: int
) -> int | None:
    if not spec.HasField(field):
        return None
    value: int = getattr(spec, field)
    if value > most:
        raise ArgumentInvalid(f"spec.{field}: must be 0 to {most}.")
    return value


def _seconds(field: str, duration: Duration, *, least_s: float) -> float:
    seconds = duration.seconds + duration.nanos / 1e9
    if not least_s <= seconds <= DURATION_S_MAX:
        raise ArgumentInvalid(f"spec.{field}: must be {least_s:g} to {DURATION_S_MAX:g} seconds.")
    return seconds


def _state(state: State) -> pb.RolloutState.ValueType:
    return pb.RolloutState.Value(f"ROLLOUT_STATE_{state.value}")


def _timestamp(time_ms: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMilliseconds(time_ms)
    return stamp
