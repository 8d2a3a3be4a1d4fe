"""The `interlock` command: what each command prints, how it fails, and that the light ones stay light."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml

from services.cli.__main__ import main
from services.common.errors import QueueFull
from services.common.tokens import TokenVerifier
from services.local.home import Home
from tests.fakes.cli_mesh import FakeMesh

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    "command", ["status", "down", "chat hello", "models list", "workers list --json"], ids=str.split
)
def test_without_a_mesh_commands_say_what_to_do(command: str, home: Home, capsys: Capture) -> None:
    """They fail with 1, name the home, and print nothing that could pass for a result."""
    assert main(command.split()) == 1
    told = capsys.readouterr()
    assert str(home.path) in told.err
    assert told.out == ""


@pytest.mark.parametrize(
    "command",
    [
        "",
        "fly",
        "up --workers 0",
        "up --workers 65",
        "up --port 65536",
        "up --port x",
        "up --quantization int3",
        "token --ttl 25h",
        "token --ttl 0",
        "token --ttl later",
        "token --weight 0",
        "token --weight 101",
        "token --concurrency few",
        "token revoke",
        "token jwks",
        "chat hi --max-tokens 0",
        "models",
        "workers drain",
        "breakers force worker-1",
        "breakers force worker-1 half_open",
    ],
)
def test_misuse_exits_with_2(command: str, capsys: Capture) -> None:
    """The usage is printed, and nothing is done."""
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    assert "usage: interlock" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("up --wokers 2", "usage: interlock up [-h]"),
        ("models push . --golden-file x", "usage: interlock models push [-h]"),
        ("token revoke x --all", "usage: interlock token revoke [-h]"),
        ("--loud envoy", "usage: interlock [-h]"),
    ],
)
def test_an_unknown_option_is_told_by_its_command(command: str, usage: str, capsys: Capture) -> None:
    """The usage that is printed is that of the command, where the option there is can be read."""
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(usage)
    assert "unrecognized arguments: --" in told


@pytest.mark.parametrize(
    "command",
    [
        "",
        "up",
        "down",
        "status",
        "token",
        "token revoke",
        "token jwks",
        "chat",
        "models fetch",
        "workers list",
        "workers drain",
        "breakers force",
    ],
)
def test_every_command_explains_itself(command: str, capsys: Capture) -> None:
    """`--help` works everywhere and exits with 0."""
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert "usage: interlock" in capsys.readouterr().out


def test_a_token_says_what_was_asked_for(home: Home, capsys: Capture) -> None:
    """Subject, scopes and lifetime of the arguments; the services of this home believe it."""
    home.prepare()
    assert main(["token", "--sub", "alice", "--scope", "generate models:read", "--ttl", "15m"]) == 0
    token = capsys.readouterr().out.strip()
    claims = TokenVerifier(home.jwt_secret).verify(token)
    assert claims.subject == "alice"
    assert claims.scopes == {"generate", "models:read"}
    lifetime = TokenVerifier(home.jwt_secret, lifetime_max_s=15 * 60)
    assert lifetime.verify(token).expires_s == claims.expires_s


@pytest.mark.parametrize("scope", ["", "generate fly"])
def test_an_unknown_scope_is_refused(scope: str, home: Home, capsys: Capture) -> None:
    """A token that allows nothing real is a mistake; the scopes there are get listed."""
    assert home.path.name == "home"
    assert main(["token", "--scope", scope]) == 1
    assert "models:read" in capsys.readouterr().err


def test_a_token_needs_a_home(home: Home, capsys: Capture) -> None:
    """No mesh would believe a token of a secret that was drawn for it alone; nothing is made."""
    assert main(["token"]) == 1
    assert "interlock up" in capsys.readouterr().err
    assert not home.path.exists()


@pytest.mark.parametrize("subject", ["", " ", "a\nb", "\x1b[31m"])
def test_a_token_is_for_somebody(subject: str, home: Home, capsys: Capture) -> None:
    """An empty subject, or one with control characters, names no tenant."""
    home.prepare()
    assert main(["token", "--sub", subject]) == 1
    assert "--sub" in capsys.readouterr().err


def test_an_unknown_model_is_refused_before_anything_is_fetched(home: Home, capsys: Capture) -> None:
    """`models fetch` says which names there are, and neither announces a fetch nor makes a home."""
    assert main(["models", "fetch", "nope"]) == 1
    told = capsys.readouterr()
    assert "smollm2-135m-instruct" in told.err
    assert "Fetching" not in told.err
    assert not home.path.exists()


@pytest.mark.parametrize(
    ("model", "words"), [("./nosuch", "does not exist"), ("", "--model is empty")], ids=["absent", "empty"]
)
def test_a_model_that_is_not_there_is_told_so(model: str, words: str, home: Home, capsys: Capture) -> None:
    """The message says what is wrong with the argument itself."""
    assert main(["up", "--port", "0", "--model", model]) == 1
    assert words in capsys.readouterr().err
    assert home.holder() is None


def test_a_model_without_a_tokenizer_is_refused_at_once(home: Home, tmp_path: Path, capsys: Capture) -> None:
    """Every missing file is named, before any process starts."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert main(["up", "--port", "0", "--model", str(model)]) == 1
    assert "no tokenizer.json, no *.safetensors" in capsys.readouterr().err
    assert home.holder() is None


@pytest.mark.parametrize("command", ["status", "token", "up", "down", "models fetch"])
def test_a_home_that_is_a_file_gives_one_line(command: str, home: Home, capsys: Capture) -> None:
    """Whatever is wrong with files is the user's to know, not a traceback."""
    home.path.write_text("")
    assert main(command.split()) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_breakers_are_listed_held_and_released(mesh: FakeMesh, capsys: Capture) -> None:
    """People read states as words; JSON has the contract's own names."""
    assert mesh.requests == []
    assert main(["breakers", "list"]) == 0
    assert "gateway-1  worker-1  open   40     21" in capsys.readouterr().out
    assert main(["breakers", "force", "worker-1", "open"]) == 0
    assert "forced open" in capsys.readouterr().out
    assert main(["breakers", "release", "store", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["target"], row["state"]) == ("store", "BREAKER_STATE_CLOSED")


def test_chat_prints_the_answer(mesh: FakeMesh, capsys: Capture) -> None:
    """The chunks come out as one text, without control characters that would steer the terminal."""
    assert main(["chat", "Where?", "--model", "tiny", "--max-tokens", "7"]) == 0
    assert capsys.readouterr().out == "The capital is Paris.[31m\n"
    (request,) = mesh.requests
    assert (request.model, request.max_tokens) == ("tiny", 7)
    assert [(turn.role, turn.content) for turn in request.chat.messages] == [("user", "Where?")]


def converse(monkeypatch: pytest.MonkeyPatch, questions: Iterable[str]) -> None:
    """Asks in one conversation; the end of input ends it."""
    lines = iter(questions)

    def read(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat"]) == 0


def test_a_conversation_is_remembered(
    mesh: FakeMesh, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second question is sent with the first one and its answer."""
    converse(monkeypatch, ["First?", "", "Second?"])
    assert capsys.readouterr().out.count("Paris") == 2
    roles = [turn.role for turn in mesh.requests[1].chat.messages]
    assert roles == ["user", "assistant", "user"]
    assert mesh.requests[1].chat.messages[2].content == "Second?"


def test_a_long_conversation_forgets_its_beginning(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """What is sent begins with a question each time, and its size has a bound."""
    converse(monkeypatch, [f"{number}?" for number in range(35)])
    asked = [[turn.role for turn in request.chat.messages] for request in mesh.requests]
    assert [len(turns) for turns in asked] == [min(2 * number + 1, 63) for number in range(35)]
    assert all(turns == (["user", "assistant"] * 32)[: len(turns)] for turns in asked)
    assert mesh.requests[-1].chat.messages[0].content == "3?"
    assert not capsys.readouterr().err


def test_what_the_context_does_not_hold_is_forgotten(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The oldest question goes with its answer, for good, until the rest has room."""
    mesh.turns_max = 4
    converse(monkeypatch, ["1?", "2?", "3?", "4?"])
    told = capsys.readouterr()
    assert (told.out.count("Paris"), told.err) == (4, "")
    asked = [[turn.content for turn in request.chat.messages[::2]] for request in mesh.requests]
    assert asked == [["1?"], ["1?", "2?"], ["1?", "2?", "3?"], ["2?", "3?"], ["2?", "3?", "4?"], ["3?", "4?"]]


def test_a_question_without_room_is_told_and_the_rest_kept(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """It fails once it is alone; another failure is not asked about again."""

    def questions() -> Iterator[str]:
        yield "1?"
        mesh.turns_max = 0
        yield "too long?"
        mesh.turns_max = 9
        yield "2?"
        mesh.error = QueueFull("The queue is full.")
        yield "3?"

    converse(monkeypatch, questions())
    assert capsys.readouterr().err == "interlock: Too long.\ninterlock: The queue is full.\n"
    sent = [[turn.content for turn in request.chat.messages[::2]] for request in mesh.requests]
    assert sent == [["1?"], ["1?", "too long?"], ["too long?"], ["1?", "2?"], ["1?", "2?", "3?"]]


def test_a_refusal_is_told_with_its_delay(mesh: FakeMesh, capsys: Capture) -> None:
    """The server's message and its delay reach the user, and the exit code is 1."""
    mesh.error = QueueFull("The queue is full.", retry_after_s=1.5)
    assert main(["chat", "hi"]) == 1
    assert "The queue is full. Try again in 1.5 s." in capsys.readouterr().err


def test_models_and_workers_are_listed(mesh: FakeMesh, capsys: Capture) -> None:
    """A table for people, and JSON with the fields of the contract."""
    assert mesh.home.holder() is not None
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["tiny", "r1", "int8", "64", "1"]
    assert main(["workers", "list"]) == 0
    assert "tiny@r1 active" in capsys.readouterr().out
    assert main(["models", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["quantization"] == "QUANTIZATION_INT8"
    assert main(["workers", "list", "--json"]) == 0
    (worker,) = json.loads(capsys.readouterr().out)
    assert worker["state"] == "WORKER_STATE_SERVING"
    assert worker["load"]["slots"] == 4


def test_a_worker_is_taken_out_of_service(mesh: FakeMesh, capsys: Capture) -> None:
    """It is shown as it is then; one that is not there is named, with where to look."""
    assert mesh.home.holder() is not None
    assert main(["workers", "drain", "worker-1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["worker-1", "draining"]
    assert main(["workers", "drain", "worker-1", "--json"]) == 0
    (worker,) = json.loads(capsys.readouterr().out)
    assert (worker["id"], worker["state"]) == ("worker-1", "WORKER_STATE_DRAINING")
    assert main(["workers", "drain", "worker-9"]) == 1
    told = capsys.readouterr()
    assert (told.out, "worker-9" in told.err, "interlock workers list" in told.err) == ("", True, True)


def test_down_does_not_mind_that_the_mesh_ended_by_itself(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Between the look and the signal; what was asked for is so."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    seen = [process.pid, None]
    monkeypatch.setattr(Home, "holder", lambda _: seen.pop(0))
    assert main(["down"]) == 0
    assert f"{home.path} (process {process.pid})" in capsys.readouterr().out


def test_up_in_a_home_in_use_is_refused(mesh: FakeMesh, capsys: Capture) -> None:
    """Neither in front nor in the background does a second mesh start; the first one's process is named."""
    for command in (["up"], ["up", "--detach"]):
        assert main(command) == 1
        told = capsys.readouterr().err
        assert f"process {mesh.home.holder()}" in told
        assert "interlock down" in told


def test_up_needs_a_model(home: Home, tmp_path: Path, capsys: Capture) -> None:
    """A directory without a model, and a name that nobody knows, end the command before anything starts."""
    assert main(["up", "--port", "0", "--model", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err
    assert main(["up", "--port", "0", "--model", "huge"]) == 1
    assert "smollm2-135m-instruct" in capsys.readouterr().err
    assert home.holder() is None


def test_envoy_prints_a_configuration(tmp_path: Path, capsys: Capture) -> None:
    """The generator's own flags work, and the descriptor set is named by its absolute path."""
    assert main(["envoy", "--port", "81", "--gateway", "127.0.0.1:7"]) == 0
    document = yaml.safe_load(capsys.readouterr().out)
    (listener,) = document["static_resources"]["listeners"]
    assert listener["address"]["socket_address"]["port_value"] == 81
    assert "/deploy/envoy/interlock.binpb" in str(document)
    file = tmp_path / "parameters.yaml"
    file.write_text("descriptors: /elsewhere/interlock.binpb\nport: 82\n")
    assert main(["envoy", "--config", str(file)]) == 0
    assert "proto_descriptor: /elsewhere/interlock.binpb" in capsys.readouterr().out
    out = tmp_path / "envoy.yaml"
    assert main(["envoy", "--out", str(out)]) == 0
    assert out.read_text().startswith("# Made by")


@pytest.mark.parametrize("command", [["token"], ["status"]])
def test_light_commands_import_nothing_heavy(command: list[str], home: Home) -> None:
    """What is typed often starts fast: neither gRPC nor rich nor a model's libraries are loaded for it."""
    script = (
        "import sys\n"
        "from services.cli.__main__ import main\n"
        f"main({command!r})\n"
        "heavy = {'grpc', 'rich', 'torch', 'transformers', 'redis', 'yaml', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    environment = {"INTERLOCK_HOME": str(home.path)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
