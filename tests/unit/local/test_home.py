"""The home: private, of one mesh at a time, and clean after a mesh that died."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from services.local import home as local_home
from services.local.home import Home, HomeInUse, HomeUnusable, SecretElsewhere
from services.local.owner_token import owner_token, renewed_token


def _home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home", {})


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_everything_is_private(tmp_path: Path) -> None:
    """Directories are 0700 and files with secrets 0600, whatever the umask."""
    home = _home(tmp_path)
    before = os.umask(0)
    try:
        home.prepare()
        home.write_token("secret")
        assert len(home.jwt_secret) == len(home.mesh_token) == 64
    finally:
        os.umask(before)
    assert [_mode(path) for path in (home.path, home.run, home.logs, home.models)] == [0o700] * 4
    files = [path for path in home.path.iterdir() if path.is_file()]
    assert {path.name for path in files} == {"INTERLOCK_HOME", "token", "jwt_secret", "mesh_token"}
    assert {_mode(path) for path in files if path.name != "INTERLOCK_HOME"} == {0o600}


def test_a_foreign_directory_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    """A directory that others filled keeps its files, its mode and its `run`, whatever asks for a home."""
    foreign = _home(tmp_path)
    foreign.run.mkdir(parents=True)
    foreign.path.chmod(0o755)
    (foreign.run / "lock").write_text("1")
    foreign.token_file.write_text("theirs")
    before = sorted(foreign.path.rglob("*"))
    for ask in (foreign.prepare, lambda: foreign.jwt_secret, lambda: renewed_token(foreign), foreign.require):
        with pytest.raises(HomeUnusable, match=str(foreign.path)):
            ask()
    with pytest.raises(HomeUnusable), foreign.locked():
        raise AssertionError("a mesh in a foreign directory")
    assert foreign.holder() is None
    assert sorted(foreign.path.rglob("*")) == before
    assert foreign.token_file.read_text() == "theirs"
    assert _mode(foreign.path) == 0o755


@pytest.mark.parametrize("made", [("jwt_secret",), ("mesh_token",)])
def test_a_home_of_an_earlier_version_is_accepted(tmp_path: Path, made: tuple[str, ...]) -> None:
    """It has no marker, but a secret; it goes on with that one."""
    home = _home(tmp_path)
    home.path.mkdir()
    for name in made:
        (home.path / name).write_text("s" * 64)
    home.prepare()
    home.require()
    assert getattr(home, made[0]) == "s" * 64


def test_a_home_that_only_fetched_a_model_is_accepted(tmp_path: Path) -> None:
    """An earlier version left the four directories and nothing else."""
    home = _home(tmp_path)
    for directory in (home.run, home.logs, home.models, home.cache):
        directory.mkdir(parents=True)
    home.prepare()
    home.require()


def test_an_empty_directory_becomes_a_home_and_keeps_its_mode(tmp_path: Path) -> None:
    """Whoever made it decided who may look into it; what is made in it is private."""
    home = _home(tmp_path)
    home.path.mkdir(mode=0o755)
    home.prepare()
    assert _mode(home.path) == 0o755
    assert _mode(home.run) == 0o700


def test_cleaning_removes_only_what_a_mesh_makes(tmp_path: Path) -> None:
    """Files and directories of other names in `run` outlive every mesh."""
    home = _home(tmp_path)
    home.prepare()
    (home.run / "notes.json").write_text("mine")
    (home.run / "envoy.yaml").write_text("")
    (home.run / ".worker-1.json.77").write_text("")
    (home.run / ".jwt_secret-given.77.new").write_text("")
    (home.run / "worker-1.json").mkdir()
    with home.locked():
        pass
    assert {path.name for path in home.run.iterdir()} == {"notes.json", "worker-1.json"}


def test_cleaning_does_not_mind_what_a_dying_process_removes_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of a mesh that was killed renames its announcement while the next mesh cleans up."""
    home = _home(tmp_path)
    home.prepare()
    (home.run / ".worker-1.json.77").write_text("")
    listed = Path.iterdir

    def iterdir(path: Path) -> list[Path]:
        found = list(listed(path))
        for one in found:
            if one.name == ".worker-1.json.77":
                one.unlink()
        return found

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with home.locked():
        assert home.holder() == os.getpid()


def test_secrets_are_drawn_once(tmp_path: Path) -> None:
    """Every reader gets the same secret, also those who come at the same moment; the two differ."""
    seen: set[str] = set()
    threads = [threading.Thread(target=lambda: seen.add(_home(tmp_path).jwt_secret)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {_home(tmp_path).jwt_secret}
    assert _home(tmp_path).mesh_token not in seen


def test_the_environment_may_give_the_secret(tmp_path: Path) -> None:
    """`INTERLOCK_JWT_SECRET` wins over the home's own, and nothing is written."""
    home = Home(tmp_path / "home", {"INTERLOCK_JWT_SECRET": "s" * 40})
    assert home.jwt_secret == "s" * 40
    assert not home.path.exists()


def test_two_meshes_in_one_home_are_refused(tmp_path: Path) -> None:
    """The second one is told which process holds the home; afterwards the home is free."""
    home = _home(tmp_path)
    with home.locked():
        assert home.holder() == os.getpid()
        with (
            pytest.raises(HomeInUse, match=rf"process {os.getpid()}.*interlock down"),
            _home(tmp_path).locked(),
        ):
            raise AssertionError("two meshes in one home")
        assert home.holder() == os.getpid()
    assert home.holder() is None
    assert list(home.run.iterdir()) == []


def test_who_looks_at_a_dead_mesh_s_lock_is_no_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two may look at once and see none, and a mesh that starts meanwhile waits for their end."""
    home = _home(tmp_path)
    home.prepare()
    lock = home.run / "lock"
    lock.write_text(str(os.getpid()))
    with lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert home.holder() is None
        monkeypatch.setattr(local_home, "_SETTLE_S", 10.0)
        looked = threading.Timer(0.02, fcntl.flock, (other, fcntl.LOCK_UN))
        looked.start()
        with home.locked():
            assert home.holder() == os.getpid()
        looked.join()


@pytest.mark.parametrize("began", ["", " 1"], ids=["none", "another"])
def test_a_process_that_the_lock_does_not_mean_is_no_holder(
    tmp_path: Path, began: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mesh that just took the lock of a dead one has not written its own process yet."""
    home = _home(tmp_path)
    home.prepare()
    lock = home.run / "lock"
    # What was there: a process that has ended, or whose number another one has now.
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    lock.write_text(f"{os.getpid()}{began}" if began else f"{ended.pid} 77")
    with lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert home.holder() is None
        monkeypatch.setattr(local_home, "_SETTLE_S", 10.0)
        written = threading.Timer(0.02, lock.write_text, (str(os.getpid()),))
        written.start()
        assert home.holder() == os.getpid()
        written.join()


def test_a_dead_mesh_is_cleaned_up(tmp_path: Path) -> None:
    """State, announcements and socket of a killed supervisor are gone for the next one."""
    home = _home(tmp_path)
    home.prepare()
    script = (
        "import os, pathlib, signal, sys\n"
        "from services.local.home import Home\n"
        "home = Home(pathlib.Path(sys.argv[1]), {})\n"
        "with home.locked():\n"
        "    home.state_file.write_text('{}')\n"
        "    (home.run / 'worker-1.json').write_text('{}')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(home.path)], check=False, timeout=30)
    assert home.state_file.exists()
    assert home.holder() is None
    with home.locked():
        assert not home.state_file.exists()
        assert {path.name for path in home.run.iterdir()} == {"lock", "jwt_secret-given"}


def test_a_deep_home_gets_a_short_socket(tmp_path: Path) -> None:
    """Where a Unix socket's path would be too long, a private directory elsewhere holds it for a while."""
    home = Home(tmp_path / ("d" * 60) / ("e" * 60), {})
    with home.locked():
        socket = home.socket_path()
        assert len(os.fsencode(socket)) <= 107
        assert _mode(socket.parent) == 0o700
        socket.touch()
    assert not socket.parent.exists()


def test_a_usual_home_keeps_its_socket(tmp_path: Path) -> None:
    """The socket lies in the home's own run directory where the path fits."""
    home = Home(Path("/tmp/home"), {})
    assert home.socket_path() == Path("/tmp/home/run/redis.sock")
    assert tmp_path.exists()


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """The error names the place."""
    (tmp_path / "home").write_text("")
    with pytest.raises(HomeUnusable, match=str(tmp_path)):
        _home(tmp_path).prepare()


def test_the_owner_token_is_renewed_near_its_end(tmp_path: Path) -> None:
    """A missing, broken or ending token is replaced in the file; one with time left is kept."""
    home = _home(tmp_path)
    first = renewed_token(home)
    assert renewed_token(home) == first == home.token_file.read_text().strip()
    for stale in (owner_token(home, 60), "no token", "a.b.c"):
        home.write_token(stale)
        fresh = renewed_token(home)
        assert fresh != stale
        assert home.token_file.read_text().strip() == fresh


def test_the_owner_token_is_believed_by_the_services(tmp_path: Path) -> None:
    """It carries every scope and the lifetime that services accept."""
    from services.common.tokens import SCOPES, TokenVerifier  # noqa: PLC0415 - used here alone

    home = _home(tmp_path)
    claims = TokenVerifier(home.jwt_secret).verify(renewed_token(home))
    assert claims.scopes == frozenset(SCOPES)
    assert json.dumps(claims.subject) == '"local"'


def _with_secret(tmp_path: Path, secret: str) -> Home:
    return Home(tmp_path / "home", {"INTERLOCK_JWT_SECRET": secret} if secret else {})


# What a mesh was started with, and whoever comes; empty: the home's own.
_TWO_SECRETS = pytest.mark.parametrize(
    ("believed", "other"),
    [("s" * 40, ""), ("", "t" * 40), ("s" * 40, "t" * 40)],
    ids=["given to the mesh", "given to others", "two"],
)


@_TWO_SECRETS
def test_a_mesh_believes_one_secret(tmp_path: Path, believed: str, other: str) -> None:
    """Whoever comes with another one draws none beside it, and is told what to set; nothing shows it."""
    home, stranger = _with_secret(tmp_path, believed), _with_secret(tmp_path, other)
    with home.locked():
        secret = home.jwt_secret
        assert not home.is_secret_elsewhere()
        assert stranger.is_secret_elsewhere()
        with pytest.raises(SecretElsewhere, match="Set INTERLOCK_JWT_SECRET here as it was there"):
            assert stranger.jwt_secret
        shown = [path for path in home.run.iterdir() if secret in path.read_text()]
        assert (shown, _mode(home.run / "jwt_secret-given")) == ([], 0o600)
        assert (home.path / "jwt_secret").exists() == (not believed)
    assert stranger.jwt_secret == (other or _home(tmp_path).jwt_secret)
    with stranger.locked():
        assert stranger.jwt_secret


@_TWO_SECRETS
def test_a_token_near_its_end_outlives_a_secret_that_is_elsewhere(
    tmp_path: Path, believed: str, other: str
) -> None:
    """The mesh writes the next one; a token that is over opens nothing, which is told."""
    home, stranger = _with_secret(tmp_path, believed), _with_secret(tmp_path, other)
    with home.locked():
        ending = owner_token(home, 600)
        home.write_token(ending)
        assert renewed_token(stranger) == ending
        assert renewed_token(home) != ending
        for token in (owner_token(home, -1), None):
            home.token_file.unlink() if token is None else home.write_token(token)
            with pytest.raises(SecretElsewhere):
                renewed_token(stranger)
        assert not home.token_file.exists()


@pytest.mark.parametrize("mark", ["", None], ids=["given", "unknown"])
def test_a_mesh_of_an_earlier_version_is_asked_as_before(tmp_path: Path, mark: str | None) -> None:
    """It told only that it was given its secret, or nothing: what somebody brings may be the right one."""
    home, bare = _with_secret(tmp_path, "s" * 40), _home(tmp_path)
    with home.locked():
        file = home.run / "jwt_secret-given"
        file.unlink() if mark is None else file.write_text(mark)
        assert home.jwt_secret == "s" * 40
        assert bare.is_secret_elsewhere() is (mark is not None)
