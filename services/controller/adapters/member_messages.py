"""What travels on the stream of a member. Owns: how messages become the core's data, and the other way.

What a member says is checked here, so that the core never sees a malformed id or a negative number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, assert_never

from google.protobuf.duration_pb2 import Duration
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import model_pb2, worker_pb2

from services.common.errors import ArgumentInvalid
from services.common.ids import is_valid_id
from services.common.ttft_buckets import BUCKETS
from services.controller.core.catalog import Catalog, Revision
from services.controller.core.commands import (
    Command,
    SendAbort,
    SendActivate,
    SendDrain,
    SendLease,
    SendPrepare,
    SendProve,
    SendRetire,
    SendStage,
)
from services.controller.core.judgement import Tally
from services.controller.core.member import (
    Activated,
    Device,
    Failed,
    Hello,
    Kind,
    Load,
    LoadReport,
    Progress,
    Proven,
    Ready,
    Report,
    Retired,
    Staged,
)
from services.controller.core.residency import Phase, Resident

# A member's reason is a sentence; more would only fill records and logs.
REASON_CHARS_MAX = 500
# Host and port, with room for a long DNS name.
ADDRESS_CHARS_MAX = 300
# Memory holds a handful of revisions at a time; more is a defect of the member.
RESIDENTS_MAX = 64
# A gateway reports of the revisions that it met lately; more is a defect of the gateway.
TALLIES_MAX = 64

_KINDS = {pb.MEMBER_KIND_WORKER: Kind.WORKER, pb.MEMBER_KIND_GATEWAY: Kind.GATEWAY}

QUANTIZATIONS: Mapping[str, model_pb2.Quantization.ValueType] = MappingProxyType(
    {
        "auto": model_pb2.QUANTIZATION_UNSPECIFIED,
        "none": model_pb2.QUANTIZATION_NONE,
        "int8": model_pb2.QUANTIZATION_INT8,
        "nf4": model_pb2.QUANTIZATION_NF4,
        "fp4": model_pb2.QUANTIZATION_FP4,
    }
)

DTYPES: Mapping[str, model_pb2.ComputeDtype.ValueType] = MappingProxyType(
    {
        "auto": model_pb2.COMPUTE_DTYPE_UNSPECIFIED,
        "fp32": model_pb2.COMPUTE_DTYPE_FP32,
        "bf16": model_pb2.COMPUTE_DTYPE_BF16,
    }
)

STEPS: Mapping[worker_pb2.RevisionPhase.ValueType, str] = MappingProxyType(
    {
        worker_pb2.REVISION_PHASE_FETCH: "fetch",
        worker_pb2.REVISION_PHASE_VERIFY: "verify",
        worker_pb2.REVISION_PHASE_LOAD: "load",
        worker_pb2.REVISION_PHASE_WARM: "warm",
    }
)

# What a member holds when it attaches.
_RESIDENT_PHASES: Mapping[int, Phase] = MappingProxyType(
    {
        **dict.fromkeys(STEPS, Phase.PREPARING),
        worker_pb2.REVISION_PHASE_STAGED: Phase.STAGED,
        worker_pb2.REVISION_PHASE_READY: Phase.READY,
        worker_pb2.REVISION_PHASE_ACTIVE: Phase.ACTIVE,
        worker_pb2.REVISION_PHASE_RETIRING: Phase.RETIRING,
        worker_pb2.REVISION_PHASE_FAILED: Phase.FAILED,
    }
)


def read_hello(request: pb.AttachRequest) -> Hello:
    """The first message of a member.

    Raises:
        ArgumentInvalid: It is another message, or a field is malformed.
    """
    if request.WhichOneof("event") != "hello":
        raise ArgumentInvalid("The first message of a member is `hello`.")
    hello = request.hello
    kind = _KINDS.get(hello.kind)
    if kind is None:
        raise ArgumentInvalid("`hello.kind` must be worker or gateway.")
    for name, value in (("id", hello.id), ("incarnation", hello.incarnation)):
        if not is_valid_id(value):
            raise ArgumentInvalid(f"`hello.{name}` must be 1 to 64 of the characters A-Z a-z 0-9 . _ -")
    if len(hello.address) > ADDRESS_CHARS_MAX or not hello.address.isprintable():
        raise ArgumentInvalid("`hello.address` must be a host and a port.")
    if kind is Kind.WORKER and (not hello.address or not hello.slots):
        raise ArgumentInvalid("A worker's `hello` needs an address and at least one slot.")
    if len(hello.revisions) > RESIDENTS_MAX:
        raise ArgumentInvalid(f"`hello.revisions` has more than {RESIDENTS_MAX} entries.")
    return Hello(
        kind=kind,
        id=hello.id,
        incarnation=hello.incarnation,
        address=hello.address,
        slots=hello.slots,
        devices=tuple(Device(each.kind, each.name, each.memory_bytes) for each in hello.devices),
        residents=_read_residents(hello),
        epoch=hello.epoch,
        fence=hello.fence,
    )


def read_report(request: pb.AttachRequest) -> Report | Proven:
    """Any later message of a member.

    Raises:
        ArgumentInvalid: It is empty, a second hello, or a field is malformed.
    """
    name = request.WhichOneof("event") or ""
    if name == "load":
        return LoadReport(_read_load(request.load), _read_tallies(request))
    read = _REVISION_REPORTS.get(name)
    if read is None:
        known = ", ".join(("load", *_REVISION_REPORTS))
        raise ArgumentInvalid(f"After its `hello` a member sends {known}.")
    return read(getattr(request, name))


def _read_progress(said: pb.Progress) -> Report:
    return Progress(_name(said.revision), STEPS.get(said.phase, ""), said.done_bytes, said.total_bytes)


def _read_failed(said: pb.Failed) -> Report:
    return Failed(_name(said.revision), STEPS.get(said.phase, ""), _reason(said.reason))


_REVISION_REPORTS: Mapping[str, Callable[[Any], Report | Proven]] = MappingProxyType(
    {
        "progress": _read_progress,
        "staged": lambda said: Staged(_name(said.revision)),
        "ready": lambda said: Ready(_name(said.revision), said.weights_bytes),
        "activated": lambda said: Activated(_name(said.revision), said.epoch),
        "proven": lambda said: Proven(_name(said.revision), _reason(said.reason)),
        "failed": _read_failed,
        "retired": lambda said: Retired(_name(said.revision)),
    }
)


def command_message(command: Command, catalog: Catalog) -> pb.AttachResponse:
    """What travels to a member."""
    match command:
        case SendLease(ttl_s, fence):
            made = pb.AttachResponse(lease=pb.Lease(ttl=_duration(ttl_s), fence=fence))
        case SendPrepare(model, revision, rollout_id) | SendStage(model, revision, rollout_id):
            manifest = manifest_message(catalog.revision(model, revision))
            stage_only = isinstance(command, SendStage)
            prepare = pb.Prepare(rollout_id=rollout_id, manifest=manifest, stage_only=stage_only)
            made = pb.AttachResponse(prepare=prepare)
        case SendActivate(model, revision, epoch):
            activate = pb.Activate(model=model, revision=revision, epoch=epoch)
            made = pb.AttachResponse(activate=activate)
        case SendProve(revision):
            made = pb.AttachResponse(prove=pb.Prove(revision=revision))
        case SendRetire(revision):
            made = pb.AttachResponse(retire=pb.Retire(revision=revision))
        case SendAbort(revision):
            made = pb.AttachResponse(abort=pb.Abort(revision=revision))
        case SendDrain(grace_s):
            made = pb.AttachResponse(drain=pb.Drain(grace=_duration(grace_s)))
        case _:
            assert_never(command)
    return made


def manifest_message(revision: Revision) -> model_pb2.Manifest:
    """A revision as members receive it."""
    manifest = revision.manifest
    return model_pb2.Manifest(
        model=manifest.model,
        revision=manifest.revision,
        files=[
            model_pb2.ArtifactFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)
            for file in manifest.files
        ],
        quantization=QUANTIZATIONS[manifest.quantization],
        compute_dtype=DTYPES[manifest.compute_dtype],
        context_tokens=manifest.context_tokens,
        tokenizer_sha256=manifest.tokenizer_sha256,
        local_path=revision.local_path,
        golden_prompts=[
            model_pb2.GoldenPrompt(text=one.text, expected=one.expected, max_tokens=one.max_tokens)
            for one in manifest.golden_prompts
        ],
        fallback_model=manifest.fallback_model,
    )


def _read_residents(hello: pb.Hello) -> dict[str, Resident]:
    return {
        _name(found.revision): Resident(
            phase=_resident_phase(found),
            step=STEPS.get(found.phase, ""),
            weights_bytes=found.weights_bytes,
            failure=_reason(found.failure),
        )
        for found in hello.revisions
        if found.phase in _RESIDENT_PHASES
    }


def _resident_phase(found: worker_pb2.ResidentRevision) -> Phase:
    phase = _RESIDENT_PHASES[found.phase]
    return Phase.STAGING if found.staging and phase is Phase.PREPARING else phase


def _read_load(load: worker_pb2.WorkerLoad) -> Load:
    return Load(load.running, load.slots, load.memory_bytes, load.steps, load.generated_tokens)


def _read_tallies(request: pb.AttachRequest) -> dict[str, dict[str, Tally]]:
    if len(request.tallies) > TALLIES_MAX:
        raise ArgumentInvalid(f"`tallies` has more than {TALLIES_MAX} entries.")
    tallies: dict[str, dict[str, Tally]] = {}
    for found in request.tallies:
        if len(found.ttft_counts) > BUCKETS:
            raise ArgumentInvalid(f"`tallies.ttft_counts` has more than {BUCKETS} entries.")
        tally = Tally(found.finished, found.failed, tuple(found.ttft_counts))
        tallies.setdefault(found.model, {})[_name(found.revision)] = tally
    return tallies


def _name(revision: str) -> str:
    if not is_valid_id(revision):
        raise ArgumentInvalid("A revision's name has 1 to 64 of the characters A-Z a-z 0-9 . _ -")
    return revision


def _reason(text: str) -> str:
    return "".join(character for character in text[:REASON_CHARS_MAX] if character.isprintable())


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(round(seconds * 1000))
    return duration
