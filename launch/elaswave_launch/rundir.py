"""The run folder: sockets, state and temporary logs of one job on this machine.

`$XDG_RUNTIME_DIR/elaswave-<uid>/<job>` or `/tmp/elaswave-<uid>/<job>`, mode 0700. Its launcher holds a lock on it as
long as it lives; the kernel lets go of it however the launcher ends, and the next launcher removes what is unlocked.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from elaswave.certificates import TlsFiles
from elaswave.errors import ConfigError

_LOCK = "lock"
_STATE = "controller.json"
_TOKEN = "token"
_MAX_ROOT_BYTES = 40  # Unix socket paths are limited to 107 bytes; this leaves 30 for what is below the run folder
_MAX_NAME = 20
_FLOCK = struct.Struct("hhqqi")  # struct flock of Linux: type, whence, start, length, pid


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningJob:
    """Where the controller of a running job is: content of controller.json."""

    job: str
    address: str
    """HOST:PORT."""

    pid: int
    """Of the launcher."""

    token: str
    report: str = ""
    log_dir: str = ""
    tls: TlsFiles | None = None


class RunFolder:
    """A run folder that this process has locked. Use `create_run_folder`; `remove` ends it."""

    def __init__(self, job: str, path: Path, lock: int) -> None:
        self.job = job
        self.path = path
        self._lock = lock

    def write_token(self, token: str) -> Path:
        """Keep the job's secret in a file that only this user can read; returns its path."""
        return self._write(_TOKEN, token)

    def publish(self, running: RunningJob) -> None:
        """Let `elaswave` commands find the job."""
        self._write(_STATE, json.dumps(asdict(running)))

    def remove(self) -> None:
        """Delete the folder and let go of the lock. Idempotent."""
        if self._lock < 0:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1

    def _write(self, name: str, text: str) -> Path:
        temporary, path = self.path / f".{name}.tmp", self.path / name
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
        return path


def base_folder(environment: Mapping[str, str]) -> Path:
    """Where this user's run folders are; not made here."""
    name = f"elaswave-{os.getuid()}"
    for root in (environment.get("XDG_RUNTIME_DIR", ""), environment.get("TMPDIR", "")):
        if root and os.path.isdir(root) and os.access(root, os.W_OK) and len(os.fsencode(root)) < _MAX_ROOT_BYTES:
            return Path(root) / name
    return Path("/tmp") / name


def create_run_folder(base: Path, job: str, node: int = 0) -> RunFolder:
    """Make and lock the folder of `job` for this node; an empty `job` gets a name. What dead launchers left is removed.

    Raises ConfigError where a job of this name is running, or the folder cannot be made or is not ours alone.
    """
    _make_base(base)
    with _base_lock(base):
        for leftover in _folders(base):
            _remove_if_dead(leftover)
        job = job or f"job-{secrets.token_hex(4)}"
        path = base / (_folder_name(job) + (f".{node}" if node else ""))
        try:
            path.mkdir(mode=0o700)
        except FileExistsError as error:
            raise ConfigError(f"--rdzv-id {job}: a job of this name is running; choose another name") from error
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.fcntl(lock, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    return RunFolder(job, path, lock)


def running_jobs(base: Path) -> list[RunningJob]:
    """Jobs whose launcher is alive, by name."""
    found = []
    for folder in _folders(base):
        if _is_locked(folder):
            running = _read_state(folder)
            if running is not None:
                found.append(running)
    return sorted(found, key=lambda running: running.job)


def _folder_name(job: str) -> str:
    if len(job) <= _MAX_NAME:
        return job
    return f"{job[:11]}-{hashlib.sha256(job.encode()).hexdigest()[:8]}"


def _make_base(base: Path) -> None:
    try:
        base.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the run folder {base}: {error.strerror}; set TMPDIR to a folder that can be written"
        ) from error
    found = os.lstat(base)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{base} must be a folder that only user {os.getuid()} can use: remove it or set TMPDIR")


@contextmanager
def _base_lock(base: Path) -> Iterator[None]:
    # Held for milliseconds: between making a folder and locking it, nobody may take it for a dead one.
    descriptor = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _folders(base: Path) -> list[Path]:
    try:
        return sorted(path for path in base.iterdir() if path.is_dir() and not path.is_symlink())
    except FileNotFoundError:
        return []


def _remove_if_dead(folder: Path) -> None:
    if not _is_locked(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _is_locked(folder: Path) -> bool:
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # A query only: taking the lock to see whether it is free could be in the way of its owner.
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    finally:
        os.close(descriptor)
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def _read_state(folder: Path) -> RunningJob | None:
    try:
        content: object = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None  # still starting, or another node's folder
    except ValueError:
        content = None
    try:
        found = dict(content) if isinstance(content, dict) else {}
        tls = found.pop("tls", None)
        return RunningJob(**found, tls=None if tls is None else TlsFiles(**tls))
    except TypeError as error:
        text = f"{folder / _STATE} is not a state file of this version: stop the job and start it again"
        raise ConfigError(text) from error
