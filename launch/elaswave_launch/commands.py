"""The command lines of the processes of a job: zygote, controller, agents."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from elaswave.errors import ConfigError
from elaswave_launch.children import Command, python
from elaswave_launch.preflight import Launch


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a job runs on this machine."""

    job: str
    run_dir: Path
    log_dir: Path
    """Logs are below `log_dir/job`."""

    token_file: Path
    port: int
    """Of the controller."""

    master_port: int
    """For the script's own use, as torchrun's MASTER_PORT."""

    @property
    def job_logs(self) -> Path:
        return self.log_dir / self.job


class HeldPort:
    """A port that nobody else can take until the controller listens at it. `close` it at the end."""

    def __init__(self, held: socket.socket) -> None:
        self._held = held
        self.port: int = held.getsockname()[1]

    def close(self) -> None:
        """Let go of the port. Idempotent."""
        self._held.close()


def hold_port(host: str, port: int) -> HeldPort:
    """Take `port` (0: any) so that only a server of this user that shares it, as gRPC's does, can listen there.

    So the agents can be told the port before the controller runs. Raises ConfigError.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    held = socket.socket(family, kind, protocol)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        held.bind(address)
    except OSError as error:
        held.close()
        raise ConfigError(f"endpoint {host}:{port}: cannot listen there ({error.strerror})") from error
    return HeldPort(held)


def free_port(host: str) -> int:
    """A port that was free a moment ago."""
    held = hold_port(host, 0)
    held.close()
    return held.port


def all_commands(launch: Launch, place: Place, environment: Mapping[str, str]) -> list[Command]:
    """Every process of this machine; the zygote first, as its import of torch takes longest."""
    options = launch.options
    base = dict(environment)
    found = []
    if options.start == "fork" and options.zygote is None:
        arguments = python(
            "elaswave.runtime.zygote", "--socket", _zygote_socket(place), "--parent-pid", str(os.getpid())
        )
        found.append(Command(name="zygote", arguments=arguments, environment=base, log=place.job_logs / "zygote.log"))
    if options.starts_controller:
        log = place.job_logs / "controller.log"
        arguments = controller_arguments(launch, place)
        found.append(Command(name="controller", arguments=arguments, environment=base, log=log))
    for rank in range(options.first_node, options.first_node + options.local_agents):
        name = f"agent node{rank}"
        found.append(
            Command(
                name=name,
                arguments=agent_arguments(launch, place, rank),
                environment=base,
                log=place.job_logs / f"node{rank}.log",
            )
        )
    return found


def controller_arguments(launch: Launch, place: Place) -> tuple[str, ...]:
    """As read by elaswave_controller.options."""
    options, config = launch.options, launch.options.config
    values: dict[str, object] = {
        "job": place.job,
        "host": options.host,
        "port": place.port,
        "run-dir": place.run_dir,
        "token-file": place.token_file,
        "dp": config.dp,
        "pp": config.pp,
        "tp": config.tp,
        "spares": config.spares,
        "nnodes": config.nnodes,
        "nproc-per-node": config.nproc_per_node,
        "max-restarts": config.max_restarts,
        "replicas": config.replicas,
        "shard-elements": config.shard_elements,
        "reduce": config.reduce,
        "save-every": config.save_every,
        "report": options.report or "",
        "save-dir": options.save_dir or "",
        "resume-from": launch.resume_from or "",
        "log-cap": options.log_cap_bytes,
        "link-transport": options.link_transport,
        "node-suspect-s": options.node_suspect_s,
        "store-log": place.run_dir / "store.log",
        "shutdown-limit-s": max(0.5, options.shutdown_timeout_s - 0.5),
    }
    flags = [f"--{name}={value}" for name, value in values.items()]
    flags += [f"--inject={spec}" for spec in options.injection_specs]
    if options.unbuffered:
        flags.append("--unbuffered")
    if launch.tls is not None:
        flags.append("--tls")
    if not config.allow_fresh_start:
        flags.append("--refuse-fresh-start")
    if options.local_agents == config.nnodes:
        flags.append("--nodes-stay-lost")
    return python("elaswave_controller", *flags)


def agent_arguments(launch: Launch, place: Place, rank: int) -> tuple[str, ...]:
    """As read by elaswave_agent.options."""
    options, config = launch.options, launch.options.config
    host = f"[{options.host}]" if ":" in options.host else options.host
    values: dict[str, object] = {
        "controller": f"{host}:{place.port}",
        "node": f"node{rank}",
        "workers": config.nproc_per_node,
        "run-dir": place.run_dir,
        "log-dir": place.log_dir,
        "run-id": place.job,
        "token-file": place.token_file,
        "parent-pid": os.getpid(),
        "node-rank": rank,
        "nnodes": config.nnodes,
        "master-addr": options.host,
        "master-port": place.master_port,
        "max-restarts": config.max_restarts,
        "node-suspect-s": options.node_suspect_s,
        "link-host": options.link_host,
    }
    flags = [f"--{name}={value}" for name, value in values.items()]
    flags.append("--spawn" if options.start == "spawn" else f"--zygote={options.zygote or _zygote_socket(place)}")
    if options.module:
        flags.append("--module")
    if launch.tls is not None:
        flags.append("--tls")
    return python("elaswave_agent", *flags, "--", options.script, *options.script_args)


def with_job(launch: Launch, job: str) -> Launch:
    """The launch under the name that its run folder got."""
    return replace(launch, options=replace(launch.options, job=job))


def _zygote_socket(place: Place) -> str:
    return str(place.run_dir / "zygote")
