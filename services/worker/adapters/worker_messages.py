"""Messages. Owns: the translation between the core's data and the mesh's messages about workers."""

from __future__ import annotations

from google.protobuf import duration_pb2
from interlock.v1 import controller_service_pb2, model_pb2, worker_pb2

from services.worker.adapters.process_memory import resident_bytes
from services.worker.core.revision import (
    BecameActive,
    BecameProven,
    BecameReady,
    BecameRetired,
    BecameStaged,
    ComputeDtype,
    GoldenPrompt,
    Phase,
    PreparationFailed,
    Progressed,
    Quantization,
    Report,
    Residency,
    RevisionFile,
    RevisionSpec,
)
from services.worker.core.stepper import Pulse

_QUANTIZATIONS = {
    model_pb2.QUANTIZATION_UNSPECIFIED: Quantization.AUTO,
    model_pb2.QUANTIZATION_NONE: Quantization.NONE,
    model_pb2.QUANTIZATION_INT8: Quantization.INT8,
    model_pb2.QUANTIZATION_NF4: Quantization.NF4,
    model_pb2.QUANTIZATION_FP4: Quantization.FP4,
}

_DTYPES = {
    model_pb2.COMPUTE_DTYPE_UNSPECIFIED: ComputeDtype.AUTO,
    model_pb2.COMPUTE_DTYPE_FP32: ComputeDtype.FP32,
    model_pb2.COMPUTE_DTYPE_BF16: ComputeDtype.BF16,
}


def phase_value(phase: Phase) -> worker_pb2.RevisionPhase.ValueType:
    """A phase as the mesh names it."""
    return worker_pb2.RevisionPhase.Value(f"REVISION_PHASE_{phase.value}")


def resident_revisions(residency: Residency) -> list[worker_pb2.ResidentRevision]:
    """The resident revisions as the mesh hears of them."""
    return [
        worker_pb2.ResidentRevision(
            model=one.model,
            revision=one.revision,
            phase=phase_value(one.phase),
            weights_bytes=one.weights_bytes,
            failure=one.failure,
            staging=one.staging,
        )
        for one in residency.all
    ]


def worker_load(pulse: Pulse, slots: int) -> worker_pb2.WorkerLoad:
    """What the worker carries; `slots` is 0 while it drains: nothing may start."""
    return worker_pb2.WorkerLoad(
        running=pulse.running,
        slots=slots,
        memory_bytes=resident_bytes(),
        steps=pulse.steps,
        generated_tokens=pulse.generated_tokens,
    )


def revision_spec(manifest: model_pb2.Manifest) -> RevisionSpec:
    """A manifest as the core knows it; values from a newer mesh count as absent."""
    return RevisionSpec(
        model=manifest.model,
        revision=manifest.revision,
        files=tuple(RevisionFile(one.path, one.size_bytes, one.sha256) for one in manifest.files),
        quantization=_QUANTIZATIONS.get(manifest.quantization, Quantization.AUTO),
        compute_dtype=_DTYPES.get(manifest.compute_dtype, ComputeDtype.AUTO),
        context_tokens=manifest.context_tokens,
        local_path=manifest.local_path,
        golden_prompts=tuple(
            GoldenPrompt(one.text, one.expected, one.max_tokens) for one in manifest.golden_prompts
        ),
    )


def report_message(report: Report) -> controller_service_pb2.AttachRequest:
    """A report as the controller reads it."""
    request = controller_service_pb2.AttachRequest()
    match report:
        case Progressed(revision, phase, done_bytes, total_bytes):
            request.progress.revision = revision
            request.progress.phase = phase_value(phase)
            request.progress.done_bytes = done_bytes
            request.progress.total_bytes = total_bytes
        case BecameStaged(revision):
            request.staged.revision = revision
        case BecameReady(revision, weights_bytes, phases_s):
            request.ready.revision = revision
            request.ready.weights_bytes = weights_bytes
            for name, duration_s in phases_s:
                duration = duration_pb2.Duration(nanos=0)
                duration.FromNanoseconds(int(duration_s * 1e9))
                request.ready.phases[name].CopyFrom(duration)
        case BecameActive(revision, epoch):
            request.activated.revision = revision
            request.activated.epoch = epoch
        case BecameProven(revision, reason):
            request.proven.revision = revision
            request.proven.reason = reason
        case PreparationFailed(revision, phase, reason):
            request.failed.revision = revision
            request.failed.phase = phase_value(phase)
            request.failed.reason = reason
        case BecameRetired(revision):
            request.retired.revision = revision
    return request
