"""Bytes that are no text, as a terminal of another encoding sends them: who takes them, and where."""

from __future__ import annotations

import io
import sys

import pytest

from services.cli.__main__ import main
from services.cli.parser import build
from tests.fakes.cli_mesh import FakeMesh

Capture = pytest.CaptureFixture[str]

# What Python makes of an `é` that comes in Latin-1.
LATIN = "caf\udce9"


@pytest.mark.parametrize(
    "command",
    [
        "chat ?",
        "chat hello --model ?",
        "models rm ?",
        "models push . --name ?",
        "rollouts start tiny ?",
        "token --sub ?",
        "token revoke ?",
        "up --model ?",
        "workers drain ?",
    ],
)
def test_bytes_that_are_no_text_are_refused(command: str, capsys: Capture) -> None:
    """As a wrong call, by the argument's name, before anything is asked or sent."""
    with pytest.raises(SystemExit) as caught:
        main([LATIN if word == "?" else word for word in command.split()])
    assert caught.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert ": error: argument " in told[-1]
    assert "not UTF-8" in told[-1]


@pytest.mark.parametrize("command", ["token --key ?", "token jwks ?", "models push ?"])
def test_a_path_may_have_any_bytes(command: str) -> None:
    """They are the file system's."""
    found = vars(build().parse_args([LATIN if word == "?" else word for word in command.split()]))
    assert LATIN in (found.get("key"), found.get("path"), *found.get("keys", ()))


def test_a_line_that_is_no_text_does_not_end_a_conversation(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """It is told and left out, also where it is the last one."""
    typed = io.BytesIO(b"caf\xe9\nSecond?\ncaf\xe9")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="utf-8"))
    assert main(["chat"]) == 0
    told = capsys.readouterr()
    assert told.out.count("Paris") == 1
    assert [line for line in told.err.splitlines() if "not UTF-8" not in line] == []
    assert told.err.count("not UTF-8") == 2
    assert [turn.content for request in mesh.requests for turn in request.chat.messages] == ["Second?"]
