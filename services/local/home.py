"""The mesh's home. Owns: `$INTERLOCK_HOME`, its directories and secrets, and that one mesh lives in it.

Everything in it is for its owner's eyes: directories are 0700, files with secrets 0600.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

DEFAULT = ".interlock"

# `sockaddr_un` holds 108 bytes, the last of them a zero.
_SOCKET_PATH_BYTES_MAX = 107
_SOCKET_NAME = "redis.sock"


class HomeInUse(Exception):
    """A mesh runs in this home already; the message names its process."""


class HomeUnusable(Exception):
    """The home cannot be made private; the message says what is wrong with it."""


class Home:
    """`$INTERLOCK_HOME` of one mesh.

    Args:
        path: The directory; made when needed.
        environ: May give the secrets (`INTERLOCK_JWT_SECRET`, `INTERLOCK_MESH_TOKEN`).
    """

    def __init__(self, path: Path, environ: Mapping[str, str]) -> None:
        self.path = path.absolute()
        self._environ = environ

    @classmethod
    def of_environment(cls, environ: Mapping[str, str]) -> Home:
        """The home that `INTERLOCK_HOME` names, `.interlock` in the working directory without it."""
        return cls(Path(environ.get("INTERLOCK_HOME") or DEFAULT), environ)

    @property
    def run(self) -> Path:
        """What lives as long as a mesh: lock, socket, announcements."""
        return self.path / "run"

    @property
    def logs(self) -> Path:
        """One log a process."""
        return self.path / "logs"

    @property
    def models(self) -> Path:
        """Fetched models."""
        return self.path / "models"

    @property
    def cache(self) -> Path:
        """What services fetch from each other."""
        return self.path / "cache"

    @property
    def state_file(self) -> Path:
        """Describes the running mesh."""
        return self.path / "state.json"

    @property
    def token_file(self) -> Path:
        """A token of every scope, for the owner's own calls."""
        return self.path / "token"

    @property
    def jwt_secret(self) -> str:
        """The secret that tokens are signed with; drawn once."""
        return self._environ.get("INTERLOCK_JWT_SECRET") or self._secret("jwt_secret")

    @property
    def mesh_token(self) -> str:
        """What services prove their membership with; drawn once."""
        return self._environ.get("INTERLOCK_MESH_TOKEN") or self._secret("mesh_token")

    def prepare(self) -> None:
        """Makes the directories, private ones.

        Raises:
            HomeUnusable: A directory cannot be made or is another user's.
        """
        for directory in (self.path, self.run, self.logs, self.models, self.cache):
            _make_private(directory)

    def socket_path(self) -> Path:
        """Where Redis listens: in `run`, or in a short private directory where that path is too long."""
        path = self.run / _SOCKET_NAME
        if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES_MAX:
            return path
        return self._short_directory() / _SOCKET_NAME

    def write_token(self, token: str) -> None:
        """Replaces the token file."""
        _write_private(self.token_file, token + "\n")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the home for one mesh, and cleans what a dead one left in it.

        Raises:
            HomeInUse: Another mesh lives.
        """
        self.prepare()
        file = self._lock()
        try:
            self._clean()
            yield
        finally:
            self._clean()
            # Removed while it is held: whoever opened it meanwhile sees that it is not the file any more.
            self._lock_file.unlink(missing_ok=True)
            os.close(file)

    def holder(self) -> int | None:
        """The process that holds the home; None when no mesh runs."""
        try:
            file = os.open(self._lock_file, os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(file, 32, 0)
            return int(text) if text.isdigit() else None
        finally:
            os.close(file)
        return None

    @property
    def _lock_file(self) -> Path:
        return self.run / "lock"

    def _lock(self) -> int:
        while True:
            file = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.pread(file, 32, 0).decode()
                os.close(file)
                raise HomeInUse(
                    f"A mesh runs in {self.path} already (process {pid or 'unknown'}). "
                    "Stop it with `interlock down`, or set INTERLOCK_HOME to another directory."
                ) from None
            if self._is_current(file):
                os.truncate(file, 0)
                os.pwrite(file, str(os.getpid()).encode(), 0)
                return file
            os.close(file)

    def _is_current(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), self._lock_file.stat())
        except FileNotFoundError:
            return False

    def _clean(self) -> None:
        """Removes what describes a mesh that is not there."""
        self.state_file.unlink(missing_ok=True)
        for path in self.run.iterdir():
            if path != self._lock_file:
                path.unlink()
        short = self._short_path()
        (short / _SOCKET_NAME).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            short.rmdir()

    def _short_path(self) -> Path:
        # Found again by the next mesh of this home, so that nothing is left for good.
        digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"interlock-{os.getuid()}-{digest}"

    def _short_directory(self) -> Path:
        path = self._short_path()
        # The directory for temporary files is everybody's: a link there may be a trap.
        _make_private(path, follow_symlinks=False)
        return path

    def _secret(self, name: str) -> str:
        path = self.path / name
        _make_private(self.path)
        # A link appears with its whole content or not at all: two callers agree on the first one's secret.
        temporary = path.with_name(f".{name}.{os.getpid()}.{secrets.token_hex(4)}")
        if not path.exists():
            _write_private(temporary, secrets.token_hex(32))
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(temporary)
            temporary.unlink()
        return path.read_text().strip()


def _make_private(directory: Path, *, follow_symlinks: bool = True) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat(follow_symlinks=follow_symlinks)
    except OSError as error:
        raise HomeUnusable(f"{directory} cannot be made: {error.strerror}.") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise HomeUnusable(f"{directory} is not a directory of yours; remove it or set INTERLOCK_HOME.")
    if stat.S_IMODE(found.st_mode) != 0o700:
        directory.chmod(0o700)


def _write_private(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123 - private from its first byte
        file.write(text)
    temporary.replace(path)
