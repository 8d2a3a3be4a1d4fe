"""The mesh's home. Owns: `$INTERLOCK_HOME`, its directories and secrets, and that one mesh lives in it.

Everything in it is for its owner's eyes: directories are 0700, files with secrets 0600. A directory that
somebody else filled is never a home, and of a home only what a mesh makes is ever removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

DEFAULT = ".interlock"

# `sockaddr_un` holds 108 bytes, the last of them a zero.
_SOCKET_PATH_BYTES_MAX = 107
_REDIS_SOCKET = "redis.sock"
_ADMIN_SOCKET = "envoy-admin.sock"
_SOCKETS = (_REDIS_SOCKET, _ADMIN_SOCKET)

# Says that a directory is a home; whoever finds one without it has found somebody's files.
_MARKER = "INTERLOCK_HOME"
_MARKER_TEXT = "This directory belongs to a local Interlock mesh: its secrets, logs, models and state.\n"
_SECRETS = ("jwt_secret", "mesh_token")
_JWT_SECRET = "INTERLOCK_JWT_SECRET"  # noqa: S105 - the name of a variable
_GIVEN = "jwt_secret-given"
_GIVEN_TEXT = b"interlock-home"
_DIRECTORIES = ("run", "logs", "models", "cache")

# What a mesh makes in `run`: Envoy's files, sockets, a mark, announcements and their temporary names.
_RUN_NAMES = re.compile(
    r"envoy\.yaml|envoy-admin-address|redis\.sock|envoy-admin\.sock|jwt_secret-given|\.jwt_secret-given\.\d+\.new"
    r"|(controller|gateway|worker)-\d+\.json|\.(controller|gateway|worker)-\d+\.json\.\d+"
)


# Who takes the lock has written its process an instant later, and who only looks has let go of it.
_SETTLE_S = 0.1
_LOOK_S = 0.005
_LOCK_TEXT_BYTES = 64


class HomeInUse(Exception):
    """A mesh runs in this home already; the message names its process."""


class HomeUnusable(Exception):
    """The home cannot be made private; the message says what is wrong with it."""


class SecretElsewhere(HomeUnusable):
    """The running mesh does not believe what the home could sign; the message says what to set."""


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
        """The secret that tokens are signed with; drawn once.

        Raises:
            SecretElsewhere: The mesh that runs here believes another one.
        """
        if self.is_secret_elsewhere():
            raise SecretElsewhere(
                f"The mesh in {self.path} was started with another secret than the one here, and believes "
                f"what is signed with that alone. Set {_JWT_SECRET} here as it was there, or unset it if it "
                "was not set there."
            )
        return self._chosen_secret()

    def is_secret_elsewhere(self) -> bool:
        """Whether a mesh runs here that believes another secret than the environment's, or the home's own."""
        if self.holder() is None:
            return False
        try:
            mark = self._given_file.read_text()
        except FileNotFoundError:
            # Of an earlier version, and it may be the same secret; or the mesh has just ended.
            return False
        given = self._environ.get(_JWT_SECRET)
        if not mark:
            # Of an earlier version as well: it was given one, and does not say which.
            return not given
        own = self.path / "jwt_secret"
        # One that is not there is not drawn: nobody would believe it.
        return mark != _mark_of(given or (own.read_text().strip() if own.exists() else ""))

    @property
    def mesh_token(self) -> str:
        """What services prove their membership with; drawn once."""
        return self._environ.get("INTERLOCK_MESH_TOKEN") or self._secret("mesh_token")

    def prepare(self) -> None:
        """Makes the directories, private ones.

        Raises:
            HomeUnusable: A directory cannot be made, or is another user's or another program's.
        """
        self._claim()
        for name in _DIRECTORIES:
            _make_private(self.path / name)

    def require(self) -> None:
        """Raises HomeUnusable where no mesh has lived yet."""
        if not self._is_home():
            raise HomeUnusable(f"{self.path} is no home of a mesh yet. Start one with `interlock up`.")

    def socket_path(self) -> Path:
        """Where Redis listens: in `run`, or in a short private directory where that path is too long."""
        return self._socket(_REDIS_SOCKET)

    def admin_socket_path(self) -> Path:
        """Where Envoy's admin interface listens, for this user alone; placed as `socket_path`."""
        return self._socket(_ADMIN_SOCKET)

    def _socket(self, name: str) -> Path:
        path = self.run / name
        if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES_MAX:
            return path
        return self._short_directory() / name

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
            _write_private(self._given_file, _mark_of(self._chosen_secret()))
            yield
        finally:
            self._clean()
            # Removed while it is held: whoever opened it meanwhile sees that it is not the file any more.
            self._lock_file.unlink(missing_ok=True)
            os.close(file)

    def holder(self) -> int | None:
        """The process that holds the home; None when no mesh runs."""
        end_s = time.monotonic() + _SETTLE_S
        while self._is_home():
            try:
                file = os.open(self._lock_file, os.O_RDONLY)
            except FileNotFoundError:
                return None
            try:
                # Shared: two who look at once must not take each other for a mesh.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _living(os.pread(file, _LOCK_TEXT_BYTES, 0))
            else:
                return None
            finally:
                os.close(file)
            if holder is not None or time.monotonic() > end_s:
                return holder
            time.sleep(_LOOK_S)
        return None

    @property
    def _given_file(self) -> Path:
        """Tells the secret of the mesh that runs from others, and not what it is."""
        return self.run / _GIVEN

    @property
    def _lock_file(self) -> Path:
        return self.run / "lock"

    def _lock(self) -> int:
        end_s = time.monotonic() + _SETTLE_S
        while True:
            file = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _living(os.pread(file, _LOCK_TEXT_BYTES, 0))
                os.close(file)
                if time.monotonic() < end_s:
                    time.sleep(_LOOK_S)
                    continue
                raise HomeInUse(
                    f"A mesh runs in {self.path} already (process {holder or 'unknown'}). "
                    "Stop it with `interlock down`, or set INTERLOCK_HOME to another directory."
                ) from None
            if self._is_current(file):
                os.truncate(file, 0)
                os.pwrite(file, f"{os.getpid()} {_began(os.getpid())}".encode(), 0)
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
            if _RUN_NAMES.fullmatch(path.name) and not path.is_dir():
                # A process of the dead mesh may be about to end, and removes or renames its own.
                path.unlink(missing_ok=True)
        short = self._short_path()
        for name in _SOCKETS:
            (short / name).unlink(missing_ok=True)
        # A directory with something else in it is left to whoever put it there.
        with contextlib.suppress(OSError):
            short.rmdir()

    def _claim(self) -> None:
        """Makes the directory a home, if it is none and nobody else's either."""
        if self._is_home():
            return
        _make_private(self.path)
        empty = next(self.path.iterdir(), None) is None
        # Another caller may have made it a home meanwhile.
        if not (empty or self._is_home() or self._is_old_home()):
            raise HomeUnusable(
                f"{self.path} holds other files and is no home of a mesh; nothing in it was touched. "
                "Set INTERLOCK_HOME to a new or empty directory."
            )
        # Its existence says everything, so it needs no rename: two callers at once do the same.
        (self.path / _MARKER).write_text(_MARKER_TEXT)

    def _is_home(self) -> bool:
        # Homes of earlier versions have no marker, but secrets of ours.
        return any((self.path / name).is_file() for name in (_MARKER, *_SECRETS))

    def _is_old_home(self) -> bool:
        """A home of an earlier version that fetched a model and never ran: our directories, and no more."""
        return {path.name for path in self.path.iterdir()} == set(_DIRECTORIES)

    def _short_path(self) -> Path:
        # Found again by the next mesh of this home, so that nothing is left for good.
        digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"interlock-{os.getuid()}-{digest}"

    def _short_directory(self) -> Path:
        path = self._short_path()
        # The directory for temporary files is everybody's: a link there may be a trap.
        _make_private(path, follow_symlinks=False)
        if path.stat(follow_symlinks=False).st_mode & 0o077:
            raise HomeUnusable(f"{path} can be read by others; remove it.")
        return path

    def _chosen_secret(self) -> str:
        return self._environ.get(_JWT_SECRET) or self._secret("jwt_secret")

    def _secret(self, name: str) -> str:
        path = self.path / name
        self._claim()
        # A link appears with its whole content or not at all: two callers agree on the first one's secret.
        temporary = path.with_name(f".{name}.{os.getpid()}.{secrets.token_hex(4)}")
        if not path.exists():
            _write_private(temporary, secrets.token_hex(32))
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(temporary)
            temporary.unlink()
        return path.read_text().strip()


def _mark_of(secret: str) -> str:
    return hmac.digest(os.fsencode(secret), _GIVEN_TEXT, "sha256").hex()


def _living(text: bytes) -> int | None:
    """The process that a lock's text names; None when that one is gone, or the text is not written yet.

    The text may be that of a mesh that died, whose lock another one has just taken. By then its number can
    belong to any program.
    """
    pid, _, began = text.decode(errors="replace").partition(" ")
    if not pid.isdecimal():
        return None
    # Meshes of earlier versions wrote their number alone.
    return int(pid) if not began or began == _began(int(pid)) else None


def _began(pid: int) -> str:
    """When a process began, in the kernel's ticks since its boot; empty when there is none.

    Together with its number it names one process, and no later one.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    # The program's name stands in brackets and may hold anything; the beginning is field 22.
    return status.rpartition(b")")[2].split()[19].decode()


def _make_private(directory: Path, *, follow_symlinks: bool = True) -> None:
    """Makes a directory of mode 0700; one that is there keeps the mode that its maker gave it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat(follow_symlinks=follow_symlinks)
    except OSError as error:
        raise HomeUnusable(f"{directory} cannot be made: {error.strerror}.") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise HomeUnusable(f"{directory} is not a directory of yours; remove it or set INTERLOCK_HOME.")


def _write_private(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123 - private from its first byte
        file.write(text)
    temporary.replace(path)
