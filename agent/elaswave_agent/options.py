"""Flags of `python -m elaswave_agent`, as values."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elaswave.certificates import TlsFiles, needed_files
from elaswave.core.ids import NodeId
from elaswave.errors import ConfigError
from elaswave.process_start import Program

_MAX_SOCKET_PATH_BYTES = 107


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOptions:
    """What an agent is told at its start."""

    controller: str
    """HOST:PORT of the controller."""

    node: NodeId
    workers: int
    """Devices of this node: how many workers it runs at a time."""

    program: Program
    zygote: str | None
    """Socket of the zygote; None: spawn."""

    run_dir: Path
    log_dir: Path
    """Folder for the workers' output; files are RUN/NODE/rank_R.{out,err} in it."""

    run_id: str
    token_file: Path | None
    parent_pid: int | None
    """Process to die with, which also handles Ctrl-C; None: started by hand."""

    node_rank: int
    nnodes: int
    master_addr: str
    master_port: int
    max_restarts: int
    controller_limit_s: float
    """How long the controller may be away; after that all workers are ended."""

    node_suspect_s: float = 3.0
    """Silence after which the controller counts this node as lost."""

    link_host: str = ""
    """Where workers of this node accept links; empty: where the controller's answers arrive."""

    tls: TlsFiles | None = None
    """With which the controller is called; None: in plain text."""

    @property
    def socket_path(self) -> str:
        """Where workers of this node find their agent."""
        return str(self.run_dir / f"{self.node}.agent")

    @property
    def node_log_dir(self) -> Path:
        return self.log_dir / self.run_id / self.node


def parse_options(arguments: Sequence[str]) -> AgentOptions:
    """Everything after the first `--` is the script and its arguments. Raises ConfigError; SystemExit for bad flags."""
    ours, script = _split(arguments)
    found = _parser().parse_args(ours)
    if not script:
        raise ConfigError("no script: give `-- SCRIPT ARGS` after the agent's flags")
    if found.workers < 1:
        raise ConfigError(f"--workers {found.workers}: must be at least 1")
    run_dir = Path(found.run_dir).absolute()
    options = AgentOptions(
        controller=found.controller,
        node=NodeId(_plain_name(found.node)),
        workers=found.workers,
        program=Program(target=script[0], arguments=tuple(script[1:]), is_module=found.module),
        zygote=None if found.spawn else found.zygote,
        run_dir=run_dir,
        log_dir=Path(found.log_dir).absolute() if found.log_dir else run_dir / "logs",
        run_id=found.run_id,
        token_file=Path(found.token_file) if found.token_file else None,
        parent_pid=found.parent_pid,
        node_rank=found.node_rank,
        nnodes=found.nnodes,
        master_addr=found.master_addr,
        master_port=found.master_port,
        max_restarts=found.max_restarts,
        controller_limit_s=found.controller_limit_s,
        node_suspect_s=found.node_suspect_s,
        link_host=found.link_host,
        tls=needed_files(os.environ) if found.tls else None,
    )
    if len(options.socket_path.encode()) > _MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"socket path {options.socket_path} is longer than {_MAX_SOCKET_PATH_BYTES} bytes: use a shorter --run-dir"
        )
    return options


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    found = list(arguments)
    if "--" not in found:
        return found, []
    place = found.index("--")
    return found[:place], found[place + 1 :]


def _plain_name(name: str) -> str:
    if not name or "/" in name or name.startswith("."):
        raise ConfigError(f"--node {name!r}: must be a name that can be part of a file name")
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m elaswave_agent", allow_abbrev=False)
    parser.add_argument("--controller", required=True, metavar="HOST:PORT")
    parser.add_argument("--node", required=True, metavar="NAME")
    parser.add_argument("--workers", required=True, type=int, metavar="N")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--zygote", metavar="PATH", help="fork workers from the zygote that listens there")
    start.add_argument("--spawn", action="store_true", help="start each worker as a fresh interpreter")
    parser.add_argument("--run-dir", required=True, metavar="DIR")
    parser.add_argument("--log-dir", metavar="DIR", help="default: logs in the run folder")
    parser.add_argument("--run-id", default="run", metavar="NAME")
    parser.add_argument("--token-file", metavar="FILE")
    parser.add_argument("--parent-pid", type=int, metavar="PID")
    parser.add_argument("--node-rank", type=int, default=0, metavar="N")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N")
    parser.add_argument("--master-addr", default="127.0.0.1", metavar="HOST")
    parser.add_argument("--master-port", type=int, default=29500, metavar="PORT")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N")
    parser.add_argument("--controller-limit-s", type=float, default=300.0, metavar="SECONDS")
    parser.add_argument("--node-suspect-s", type=float, default=3.0, metavar="SECONDS")
    parser.add_argument("--link-host", default="", metavar="HOST", help="where workers accept links over TCP")
    parser.add_argument("--tls", action="store_true", help="call the controller with the files of ELASWAVE_TLS_*")
    parser.add_argument("--module", action="store_true", help="SCRIPT is a module name")
    return parser
