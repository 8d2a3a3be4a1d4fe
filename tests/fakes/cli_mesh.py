"""A stand-in for a running mesh, as the `interlock` command finds it: a home with a state, and one server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from interlock.v1.controller_service_pb2 import (
    ControllerServiceListModelsResponse,
    DrainWorkerRequest,
    DrainWorkerResponse,
    ForceBreakerRequest,
    ForceBreakerResponse,
    ListBreakersResponse,
    ListWorkersResponse,
    MissingBlob,
    PlanUploadResponse,
    RevokeTokenRequest,
    RevokeTokenResponse,
    UploadRevisionRequest,
    UploadRevisionResponse,
)
from interlock.v1.gateway_service_pb2 import GenerateRequest, GenerateResponse
from interlock.v1.generation_pb2 import FINISH_REASON_STOP, Chunk, Finished
from interlock.v1.model_pb2 import QUANTIZATION_INT8, Model, Revision
from interlock.v1.worker_pb2 import (
    BREAKER_STATE_OPEN,
    REVISION_PHASE_ACTIVE,
    WORKER_STATE_DRAINING,
    WORKER_STATE_SERVING,
    Breaker,
    BreakerState,
    ResidentRevision,
    Worker,
    WorkerLoad,
    WorkerState,
)

from services.common.errors import ContextExceeded, InterlockError, WorkerUnknown
from services.common.status import trailing_metadata
from services.common.tokens import TokenVerifier
from services.local import state
from services.local.home import Home
from services.local.state import MeshState, Part


def _bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _breaker(target: str, state: BreakerState.ValueType) -> Breaker:
    return Breaker(gateway_id="gateway-1", target=target, state=state, calls=40, failures=21)


class FakeMesh(grpc.GenericRpcHandler):
    """Answers the calls that commands make; keeps the requests; fails with `error` when it is set.

    It fails with ContextExceeded where a conversation has more turns than `turns_max`.
    An upload misses what `missing` says.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self.requests: list[GenerateRequest] = []
        self.answer = ("The capital", " is Paris.\x1b[31m")
        self.error: InterlockError | None = None
        self.turns_max = 1_024
        self.revoked: list[str] = []
        self.worker_state: WorkerState.ValueType = WORKER_STATE_SERVING
        self.missing: list[MissingBlob] = []
        self.uploaded: list[UploadRevisionRequest] = []
        self._verifier = TokenVerifier(home.jwt_secret)
        self._handlers: dict[str, Callable[[], Any]] = {
            "/interlock.v1.GatewayService/Generate": self._generate,
            "/interlock.v1.ControllerService/ListModels": self._models,
            "/interlock.v1.ControllerService/ListWorkers": self._workers,
            "/interlock.v1.ControllerService/DrainWorker": self._drain,
            "/interlock.v1.ControllerService/RevokeToken": self._revoke,
            "/interlock.v1.ControllerService/ListBreakers": self._breakers,
            "/interlock.v1.ControllerService/ForceBreaker": self._force,
            "/interlock.v1.ControllerService/PlanUpload": self._plan,
            "/interlock.v1.ControllerService/UploadRevision": self._upload,
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Finds the handler, and believes nobody without a genuine token."""
        metadata = dict(handler_call_details.invocation_metadata or ())
        self._verifier.verify(str(metadata["authorization"]).removeprefix("Bearer "))
        return self._handlers[handler_call_details.method]()

    @staticmethod
    def _fail(context: grpc.ServicerContext, error: InterlockError | None) -> None:
        """Ends the call with an error; without one it goes on."""
        if error is not None:
            context.set_trailing_metadata(trailing_metadata(error))
            context.abort(getattr(grpc.StatusCode, error.code.value), error.message)

    def _generate(self) -> Any:
        def answer(request: GenerateRequest, context: grpc.ServicerContext) -> Iterator[GenerateResponse]:
            self.requests.append(request)
            error = self.error
            if len(request.chat.messages) > self.turns_max:
                error = ContextExceeded("Too long.")
            self._fail(context, error)
            for cursor, text in enumerate(self.answer, 1):
                yield GenerateResponse(cursor=cursor, chunk=Chunk(text=text))
            end = len(self.answer) + 1
            yield GenerateResponse(cursor=end, finished=Finished(reason=FINISH_REASON_STOP))

        return grpc.unary_stream_rpc_method_handler(
            answer, request_deserializer=GenerateRequest.FromString, response_serializer=_bytes
        )

    def _models(self) -> Any:
        model = Model(
            name="tiny", revision="r1", context_tokens=64, ready_workers=1, quantization=QUANTIZATION_INT8
        )
        reply = ControllerServiceListModelsResponse(models=[model])
        return grpc.unary_unary_rpc_method_handler(lambda _, __: reply, response_serializer=_bytes)

    def _breakers(self) -> Any:
        reply = ListBreakersResponse(breakers=[_breaker("worker-1", BREAKER_STATE_OPEN)])
        return grpc.unary_unary_rpc_method_handler(lambda _, __: reply, response_serializer=_bytes)

    def _force(self) -> Any:
        def answer(request: ForceBreakerRequest, _: grpc.ServicerContext) -> ForceBreakerResponse:
            return ForceBreakerResponse(breakers=[_breaker(request.target, request.state)])

        return grpc.unary_unary_rpc_method_handler(
            answer, request_deserializer=ForceBreakerRequest.FromString, response_serializer=_bytes
        )

    def _worker(self) -> Worker:
        resident = ResidentRevision(model="tiny", revision="r1", phase=REVISION_PHASE_ACTIVE)
        return Worker(
            id="worker-1",
            address="127.0.0.1:1",
            state=self.worker_state,
            revisions=[resident],
            load=WorkerLoad(running=2, slots=4),
        )

    def _drain(self) -> Any:
        def answer(request: DrainWorkerRequest, context: grpc.ServicerContext) -> DrainWorkerResponse:
            if request.worker_id != "worker-1":
                error = WorkerUnknown("No worker of that id is attached.")
                context.set_trailing_metadata(trailing_metadata(error))
                context.abort(grpc.StatusCode.NOT_FOUND, error.message)
            self.worker_state = WORKER_STATE_DRAINING
            return DrainWorkerResponse(worker=self._worker())

        return grpc.unary_unary_rpc_method_handler(
            answer, request_deserializer=DrainWorkerRequest.FromString, response_serializer=_bytes
        )

    def _workers(self) -> Any:
        reply = ListWorkersResponse(workers=[self._worker()])
        return grpc.unary_unary_rpc_method_handler(lambda _, __: reply, response_serializer=_bytes)

    def _plan(self) -> Any:
        return grpc.unary_unary_rpc_method_handler(
            lambda _, __: PlanUploadResponse(missing=self.missing), response_serializer=_bytes
        )

    def _upload(self) -> Any:
        def answer(
            parts: Iterator[UploadRevisionRequest], context: grpc.ServicerContext
        ) -> UploadRevisionResponse:
            self.uploaded = list(parts)
            self._fail(context, self.error)
            return UploadRevisionResponse(revision=Revision(manifest=self.uploaded[0].manifest))

        return grpc.stream_unary_rpc_method_handler(
            answer, request_deserializer=UploadRevisionRequest.FromString, response_serializer=_bytes
        )

    def _revoke(self) -> Any:
        def answer(request: RevokeTokenRequest, _: grpc.ServicerContext) -> RevokeTokenResponse:
            self.revoked.append(request.token_id)
            return RevokeTokenResponse(forget_time=Timestamp(seconds=1_800_000_000))

        return grpc.unary_unary_rpc_method_handler(
            answer, request_deserializer=RevokeTokenRequest.FromString, response_serializer=_bytes
        )


@contextmanager
def running(home: Home, tls: grpc.ServerCredentials | None = None) -> Iterator[FakeMesh]:
    """A mesh in `home`, as far as commands can see: its lock is held, its state written, its port answers.

    Args:
        home: Where it is.
        tls: What it shows to clients; None: it speaks plain text.
    """
    with home.locked():
        mesh = FakeMesh(home)
        server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers((mesh,))
        free = "127.0.0.1:0"
        port = server.add_secure_port(free, tls) if tls is not None else server.add_insecure_port(free)
        address = f"127.0.0.1:{port}"
        server.start()
        part = Part("envoy", address, os.getpid())
        found = MeshState(
            http=f"{'http' if tls is None else 'https'}://{address}",
            gateways=(Part("gateway-1", address, os.getpid()),),
            controllers=(),
            workers=(),
            envoy=part,
            redis=Part("redis", f"redis://{address}", 0),
            token_file=str(home.token_file),
            pid=os.getpid(),
            model="tiny",
            admin=address,
        )
        state.write(home.state_file, found)
        try:
            yield mesh
        finally:
            server.stop(None).wait()
