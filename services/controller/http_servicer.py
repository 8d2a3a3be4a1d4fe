"""The admin paths under HTTP. Owns: how answers and errors of the controller look as JSON.

Envoy maps the paths to these methods and passes bodies as they are; a status other than 200 travels in the
initial metadata `x-interlock-status`.
"""

# ruff: noqa: ARG002 - the contract fixes which parameters a method has.

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable

from google.api.httpbody_pb2 import HttpBody
from google.protobuf import json_format
from google.protobuf.message import Message
from interlock.http.v1 import http_service_pb2_grpc

from services.common import http_errors, ids, logs
from services.common.clock import Clock
from services.common.errors import InterlockError
from services.common.grpc_types import Context
from services.common.tokens import TokenVerifier, bearer_token
from services.controller.adapters import admin_messages
from services.controller.coordinator import Coordinator
from services.controller.core.catalog import Catalog
from services.controller.core.member import Kind

SERVICE = "interlock.http.v1.AdminHttpService"
REQUEST_ID_KEY = "x-request-id"


class AdminHttpServicer(http_service_pb2_grpc.AdminHttpServiceServicer):
    """The ControllerService as JSON, field names as in the protos.

    Args:
        coordinator: Leads the members.
        catalog: The registered revisions.
        verifier: Believes the operators' tokens.
        clock: The time.
    """

    def __init__(
        self, coordinator: Coordinator, catalog: Catalog, verifier: TokenVerifier, clock: Clock
    ) -> None:
        self._coordinator = coordinator
        self._catalog = catalog
        self._verifier = verifier
        self._clock = clock

    async def ListModels(self, request: HttpBody, context: Context) -> AsyncIterator[HttpBody]:
        """`GET /v1/admin/models`."""
        yield await self._answer(context, self._models, "admin", "models:read")

    async def ListWorkers(self, request: HttpBody, context: Context) -> AsyncIterator[HttpBody]:
        """`GET /v1/admin/workers`."""
        yield await self._answer(context, self._workers, "admin")

    def _models(self) -> Message:
        workers = self._coordinator.members(Kind.WORKER)
        return admin_messages.models_message(self._catalog, workers, self._coordinator.plan)

    def _workers(self) -> Message:
        workers = self._coordinator.members(Kind.WORKER)
        return admin_messages.workers_message(workers, self._catalog.default_model(), self._clock)

    async def _answer(self, context: Context, make: Callable[[], Message], *scopes: str) -> HttpBody:
        try:
            token = bearer_token(tuple(context.invocation_metadata() or ()))
            self._verifier.verify(token).require(*scopes)
            message = make()
        except InterlockError as error:
            return await _refusal(context, error)
        await context.send_initial_metadata(((REQUEST_ID_KEY, ids.new_request_id()),))
        text = json_format.MessageToJson(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, indent=None
        )
        return HttpBody(content_type="application/json", data=text.encode())


async def _refusal(context: Context, error: InterlockError) -> HttpBody:
    """The body of a failed call; its status goes ahead in the metadata."""
    request_id = ids.new_request_id()
    logs.annotate(request_id=request_id, http_status=http_errors.status_of(error), reason=error.reason)
    metadata = (*http_errors.headers(error), (REQUEST_ID_KEY, request_id))
    await context.send_initial_metadata(metadata)
    body = {"error": http_errors.fields(error, request_id)}
    return HttpBody(content_type="application/json", data=json.dumps(body).encode())
