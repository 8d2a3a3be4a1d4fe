"""`interlock models push`: what it reads before anything is sent, and what it says where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cli.__main__ import main
from services.local.home import Home
from tests.fakes.cli_mesh import FakeMesh

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "golden.json: No such file or directory"), ("{", "golden.json: must be a JSON list such as")],
    ids=["absent", "no-json"],
)
def test_golden_prompts_that_cannot_be_read_are_told(
    content: str | None, words: str, model: Path, tmp_path: Path, home: Home, capsys: Capture
) -> None:
    """Whether the file is not there or says nothing, before the model is read."""
    del home
    golden = tmp_path / "golden.json"
    if content is not None:
        golden.write_text(content)
    assert main(["models", "push", str(model), "--golden", str(golden)]) == 1
    told = capsys.readouterr().err
    assert words in told
    assert "Reading" not in told


def test_a_push_of_what_is_there_says_so(mesh: FakeMesh, model: Path, capsys: Capture) -> None:
    """The manifest alone is sent, and no bar is drawn over bytes that are not."""
    arguments = ["--name", "tiny", "--revision", "v2", "--fallback-model", "smaller"]
    assert main(["models", "push", str(model), *arguments]) == 0
    told = capsys.readouterr()
    assert "Every file is there already" in told.err
    assert "Uploading" not in told.err
    assert "v2" in told.out
    assert [part.WhichOneof("part") for part in mesh.uploaded] == ["manifest"]
    assert mesh.uploaded[0].manifest.fallback_model == "smaller"
