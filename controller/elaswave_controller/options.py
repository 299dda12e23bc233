"""Command line of the controller process; made by the launcher, which has checked the values."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elaswave.certificates import TlsFiles, needed_files
from elaswave.core.config import ControllerConfig
from elaswave.core.injection import Injection, parse_injection
from elaswave.core.reduce_plan import REDUCE_KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerOptions:
    """Everything that the controller process is told."""

    job: str
    config: ControllerConfig
    token: str = field(repr=False)
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port."""

    port_file: Path | None = None
    """Where to write the port that was taken, for the launcher."""

    run_dir: Path
    report: Path | None = None
    save_dir: Path | None = None
    resume_from: str = ""
    injections: tuple[Injection, ...] = ()
    unbuffered: bool = False
    log_cap_bytes: int = 0
    link_transport: str = "shared"
    node_suspect_s: float = 3.0
    store_log: Path | None = None
    shutdown_limit_s: float = 4.0
    """How long agents may take to end their workers."""

    tls: TlsFiles | None = None
    """With which it is called; None: in plain text."""


_CONFIG_NUMBERS = (
    "dp", "pp", "tp", "spares", "nnodes", "nproc_per_node", "max_restarts", "replicas", "save_every",
    "shard_elements",
)  # fmt: skip


def read_options(arguments: Sequence[str]) -> ControllerOptions:
    """Options from the command line; argparse ends the process (2) where they are no options. Reads the token file."""
    parser = argparse.ArgumentParser(prog="elaswave_controller", allow_abbrev=False)
    for name in ("job", "host", "run-dir", "token-file"):
        parser.add_argument(f"--{name}", required=True)
    for name in _CONFIG_NUMBERS:
        parser.add_argument("--" + name.replace("_", "-"), type=int, required=True)
    for name in ("port", "log-cap"):
        parser.add_argument(f"--{name}", type=int, default=0)
    for name in ("port-file", "report", "save-dir", "resume-from", "store-log"):
        parser.add_argument(f"--{name}", default="")
    for name, default in (("node-suspect-s", 3.0), ("shutdown-limit-s", 4.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--link-transport", default="shared")
    parser.add_argument("--reduce", default="direct", choices=REDUCE_KINDS)
    parser.add_argument("--inject", action="append", default=[])
    parser.add_argument("--unbuffered", action="store_true")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--refuse-fresh-start", action="store_true")
    parser.add_argument("--nodes-stay-lost", action="store_true")
    found = parser.parse_args(list(arguments))
    config = ControllerConfig(
        **{name: getattr(found, name) for name in _CONFIG_NUMBERS},
        reduce=found.reduce,
        want_report=bool(found.report),
        allow_fresh_start=not found.refuse_fresh_start,
        nodes_return=not found.nodes_stay_lost,
    )
    return ControllerOptions(
        job=found.job,
        config=config,
        token=Path(found.token_file).read_text(encoding="utf-8").strip(),
        host=found.host,
        port=found.port,
        port_file=_path(found.port_file),
        run_dir=Path(found.run_dir),
        report=_path(found.report),
        save_dir=_path(found.save_dir),
        resume_from=found.resume_from,
        injections=tuple(parse_injection(spec) for spec in found.inject),
        unbuffered=found.unbuffered,
        log_cap_bytes=found.log_cap,
        link_transport=found.link_transport,
        node_suspect_s=found.node_suspect_s,
        store_log=_path(found.store_log),
        shutdown_limit_s=found.shutdown_limit_s,
        tls=needed_files(os.environ) if found.tls else None,
    )


def _path(text: str) -> Path | None:
    return Path(text) if text else None
