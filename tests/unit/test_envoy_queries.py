"""What a query may say beside its path: the generated configuration in a real Envoy, before stand-ins."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from interlock.http.v1 import http_service_pb2 as pb

from deploy.envoy.generate import DESCRIPTORS
from deploy.envoy.replies import BAD_MESSAGE
from tests.fixtures.edge import Edge, started_edge

RESUME = "/interlock.http.v1.GatewayHttpService/Resume"


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """Envoy with the local configuration on free ports."""
    with started_edge(tmp_path_factory.mktemp("edge")) as edge:
        yield edge


def _bindings() -> Iterator[tuple[str, str, str]]:
    """Method, path and a field of it, for each field of a path that Envoy transcodes."""
    for file in FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file:
        for method in (method for service in file.service for method in service.method):
            rule = method.options.Extensions[annotations_pb2.http]
            for binding in (rule, *rule.additional_bindings):
                verb = binding.WhichOneof("pattern") or ""
                path = getattr(binding, verb, "")
                for field in re.findall(r"\{(\w+)[^}]*\}", path):
                    yield verb.upper(), re.sub(r"\{[^}]*\}", "x", path), field


@pytest.mark.parametrize(("method", "path", "field"), [*_bindings()])
def test_a_query_cannot_say_otherwise_than_the_path(edge: Edge, method: str, path: str, field: str) -> None:
    """By either name of a field: who reads the path alone, as a log, would be told of another thing."""
    camel = re.sub("_(.)", lambda found: found[1].upper(), field)
    for name in (field, camel, "%" + field[:1].encode().hex() + field[1:]):
        edge.gateway.requests.clear()
        edge.controller.requests.clear()
        status, headers, body = edge.ask(method, f"{path}?{name}=y", headers={"x-request-id": "mine"})
        error = json.loads(body)["error"]
        assert (status, error["message"], headers["x-request-id"]) == (400, BAD_MESSAGE, "mine")
        if not path.startswith("/v1/models/"):
            assert (error["reason"], error["request_id"]) == ("ERROR_REASON_ARGUMENT_INVALID", "mine")
        assert not edge.gateway.requests
        assert not edge.controller.requests


@pytest.mark.parametrize(
    "target",
    [
        "/v1/generate/r1/?request_id=y",
        "/v1/generate/r1:x?request_id=y",
        "/v1//generate//r1?request_id=y",
        "/v1/%67enerate/r1?request_id=y",
        "/v1/x/../generate/r1?request_id=y",
        "/v1/generate/r1?a=b&&request%5fid=y",
        "/v1/generate/r1?request_id",
        "/v1/generate/r1?request_id=r1",
    ],
)
@pytest.mark.parametrize("content_type", ["application/json", "application/grpcx"])
def test_no_spelling_leads_past_that(edge: Edge, target: str, content_type: str) -> None:
    """Whatever the transcoder would read."""
    edge.gateway.requests.clear()
    assert edge.ask("GET", target, headers={"content-type": content_type})[0] == 400
    assert not edge.gateway.requests


@pytest.mark.parametrize(
    ("query", "cursor"),
    [("cursor=3", 3), ("beta=true&cursor=4", 4), ("a?request_id=y", 0), ("x=request_id", 0), ("", 0)],
)
def test_other_parameters_pass(edge: Edge, query: str, cursor: int) -> None:
    """Those of the request, and those that nobody knows."""
    assert edge.ask("GET", f"/v1/generate/r1?{query}")[0] == 200
    assert pb.ResumeRequest.FromString(edge.gateway.requests[RESUME]) == pb.ResumeRequest(
        request_id="r1", cursor=cursor
    )


def test_where_the_path_has_no_field_the_query_names_it(edge: Edge) -> None:
    """The revisions and rollouts of a model are asked for so; elsewhere nobody reads it."""
    for path, method in (("revisions", "ListRevisions"), ("rollouts", "ListRollouts")):
        assert edge.ask("GET", f"/v1/admin/{path}?model=m")[0] == 200
        seen = edge.controller.requests[f"/interlock.http.v1.AdminHttpService/{method}"]
        assert pb.OfModel.FromString(seen).model == "m"
    assert edge.ask("POST", "/v1/chat/completions?model=m", b"abc")[2] == b"gateway 3"
