"""Checks of this machine before anything is started: files, folders, port, history. Leaves nothing behind."""

import contextlib
import importlib.util
import json
import os
import re
import secrets
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from elaswave.certificates import (
    AUTHORITY_VARIABLE,
    CERTIFICATE_VARIABLE,
    KEY_VARIABLE,
    TlsFiles,
    files_from_environment,
    is_loopback,
    read_pem,
)
from elaswave.errors import ConfigError
from elaswave_launch.options import Devices, LaunchOptions

_STEP_FOLDER = re.compile(r"step_(\d+)")
_MAX_TOKEN_BYTES = 4096
_MIN_TOKEN_BYTES = 16
_ANSWER_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A command line that this machine can satisfy."""

    options: LaunchOptions
    resume_from: Path | None
    """Folder of the durable checkpoint to start from; None: step 0."""

    token: str
    """The job's secret; empty where node 0 makes it and this is not node 0."""

    tls: TlsFiles | None
    """With which the controller is called; None: in plain text."""


def find_devices() -> Devices:
    """CPUs that this process may use, and NVIDIA GPUs that the driver shows."""
    gpus = Path("/proc/driver/nvidia/gpus")
    count = len(list(gpus.iterdir())) if gpus.is_dir() else 0
    return Devices(cpus=len(os.sched_getaffinity(0)), gpus=count)


def check_machine(options: LaunchOptions, environment: Mapping[str, str]) -> Launch:
    """Raises ConfigError, one line, where the job cannot be started on this machine."""
    _check_script(options)
    if options.report is not None:
        _check_file("--report", options.report)
    for flag, folder in (("--log-dir", options.log_dir), ("--save-dir", options.save_dir)):
        if folder is not None:
            _check_folder(flag, folder)
    if options.zygote is not None:
        _check_zygote(options.zygote)
    resume_from = find_start(options)
    token = _token(options, environment)
    tls = _tls(options, environment)
    if options.starts_controller:
        _check_port(options.host, options.port)
    config = replace(options.config, allow_fresh_start=resume_from is None)
    return Launch(options=replace(options, config=config), resume_from=resume_from, token=token, tls=tls)


def find_start(options: LaunchOptions) -> Path | None:
    """The checkpoint to start from, None for step 0. Raises ConfigError where history is damaged or ignored."""
    if options.resume not in ("auto", "never"):
        given = Path(options.resume).absolute()
        found = given if (given / "checkpoint.json").exists() else _newest(given)
        if found is None:
            raise ConfigError(f"--resume {options.resume}: no checkpoint.json there; give the folder of a checkpoint")
        _check_index(found)
        return found
    history = None if options.save_dir is None else _newest(options.save_dir)
    if history is None or options.fresh:
        return None
    if options.resume == "never":
        raise ConfigError(
            f"--resume never: {options.save_dir} already holds {history.name}; add --fresh to start at step 0 all the"
            " same, or give another --save-dir"
        )
    _check_index(history)
    return history


def _newest(save_dir: Path) -> Path | None:
    """The folder that `latest` names; without that file, the complete checkpoint with the highest step."""
    latest = save_dir / "latest"
    if latest.is_file():
        try:
            return save_dir / latest.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{latest} cannot be read ({error}): write the name of a step folder in it") from error
    complete = []
    if save_dir.is_dir():
        for folder in save_dir.iterdir():
            found = _STEP_FOLDER.fullmatch(folder.name)
            if found and (folder / "checkpoint.json").is_file():
                complete.append((int(found[1]), folder))
    return max(complete)[1] if complete else None


def _check_index(folder: Path) -> None:
    index = folder / "checkpoint.json"
    try:
        content: object = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{index} cannot be read ({error}): give another one with --resume PATH") from error
    if not isinstance(content, dict) or not isinstance(content.get("step"), int):
        raise ConfigError(f"{index} is not the index of a checkpoint: give another one with --resume PATH")


def _check_script(options: LaunchOptions) -> None:
    if not options.script:
        raise ConfigError("SCRIPT is empty: give the path of a Python file, or -m MODULE")
    if options.module:
        top = options.script.partition(".")[0]
        # `python -m` looks in the working folder first.
        sys.path.insert(0, os.getcwd())
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            spec = None
        finally:
            sys.path.pop(0)
        if spec is None:
            raise ConfigError(f"module {options.script}: there is no module {top!r} on the Python path")
        return
    script = Path(options.script)
    if script.is_dir() or not script.exists():
        what = "is a folder" if script.is_dir() else "does not exist"
        raise ConfigError(f"script {options.script} {what}: give the path of a Python file, or -m MODULE")
    try:
        script.open("rb").close()
    except OSError as error:
        raise ConfigError(f"script {options.script} cannot be read: {error.strerror}") from error


def _check_file(flag: str, path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: is a folder; give the path of a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {path}: the folder {path.parent} does not exist; make it first")
    _try_writing(flag, path, path.parent)


def _check_folder(flag: str, folder: Path) -> None:
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"{flag} {folder}: {existing} is not a folder")
    _try_writing(flag, folder, existing)


def _try_writing(flag: str, path: Path, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot write in {folder}: {error.strerror}") from error


def _check_zygote(path: Path) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.settimeout(_ANSWER_LIMIT_S)
        try:
            probe.connect(str(path))
        except OSError as error:
            raise ConfigError(
                f"--zygote {path}: nothing answers there ({error}); start one with"
                " python -m elaswave.runtime.zygote --socket PATH, or leave the flag out"
            ) from error


def _check_port(host: str, port: int) -> None:
    for family, kind, protocol, _, address in _addresses(host, port):
        # Without SO_REUSEPORT, unlike the server itself: another server on this port makes it fail.
        with contextlib.closing(socket.socket(family, kind, protocol)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise ConfigError(
                    f"endpoint {host}:{port}: cannot listen there ({error.strerror}); choose another port,"
                    " or --standalone for a free one"
                ) from error


def _addresses(
    host: str, port: int
) -> list[tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[str, int] | tuple[str, int, int, int]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"endpoint {host}:{port}: cannot resolve {host!r} ({error.strerror})") from error
    return [entry for entry in found if isinstance(entry[4][0], str)]  # type: ignore[misc]


def _tls(options: LaunchOptions, environment: Mapping[str, str]) -> TlsFiles | None:
    """What control plane and links between machines are encrypted with; on loopback, only links are, if asked for."""
    files = files_from_environment(environment)
    if files is None:
        if options.is_reachable and not options.plaintext:
            where = options.link_host if is_loopback(options.host) else options.host
            raise ConfigError(
                f"{where} can be reached from other machines: set {CERTIFICATE_VARIABLE}, {KEY_VARIABLE} and"
                f" {AUTHORITY_VARIABLE} to PEM files (docs/launch.md), or pass --plaintext on a network that you trust"
            )
        return None
    if options.plaintext:
        raise ConfigError(f"--plaintext: {CERTIFICATE_VARIABLE} and the like are set; leave out one of both")
    read_pem(files)
    if is_loopback(options.host):
        return None
    certificate, key, authority = (str(Path(path).absolute()) for path in astuple(files))
    return TlsFiles(certificate=certificate, key=key, authority=authority)  # found from any folder, as by `elaswave`


def _token(options: LaunchOptions, environment: Mapping[str, str]) -> str:
    if options.token_file is not None:
        try:
            with options.token_file.open("rb") as file:
                token = file.read(_MAX_TOKEN_BYTES).decode("ascii").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--token-file {options.token_file}: cannot be read ({error})") from error
        return _checked(f"--token-file {options.token_file}", token)
    if environment.get("ELASWAVE_TOKEN"):
        return _checked("ELASWAVE_TOKEN", environment["ELASWAVE_TOKEN"].strip())
    if options.config.nnodes > options.local_agents:
        raise ConfigError(
            f"--nnodes {options.config.nnodes} without --standalone needs a secret that all nodes share:"
            " --token-file FILE or ELASWAVE_TOKEN"
        )
    return secrets.token_hex(32)


def _checked(source: str, token: str) -> str:
    if len(token) < _MIN_TOKEN_BYTES or not token.isprintable() or " " in token:
        raise ConfigError(f"{source}: must hold at least {_MIN_TOKEN_BYTES} printable characters without spaces")
    return token
