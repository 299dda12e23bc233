"""What a command line means: checked values. Reads no files and no environment; preflight.py looks at the machine."""

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from elaswave.certificates import is_loopback
from elaswave.core.config import ControllerConfig, check_config
from elaswave.core.injection import Injection, parse_injection
from elaswave.core.reduce_plan import REDUCE_KINDS
from elaswave.core.settings import LINK_TRANSPORTS
from elaswave.errors import ConfigError
from elaswave_launch.flags import Parsed

_JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SIZE = re.compile(r"(\d+)([KMG]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_MAX_WORKERS = 1 << 20
_MAX_PROCESSES = (
    4096  # of one machine: far more than anybody has, and less than it would take to bring the machine down
)
_MAX_PORT = 65535
_DEFAULT_PORT = 29500  # torchrun's


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What the machine has, for --nproc-per-node auto, cpu and gpu."""

    cpus: int
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """A checked command line. `config.allow_fresh_start` and the resume path are settled by preflight."""

    config: ControllerConfig
    job: str
    """Empty: make a name up."""

    script: str
    script_args: tuple[str, ...]
    module: bool
    local_agents: int
    """Agents to start on this machine."""

    first_node: int
    """Rank of the first of them; node 0 starts the controller."""

    host: str
    """Where the controller listens."""

    port: int
    """0: any free port."""

    link_host: str
    """Where workers of this machine accept links; empty: where the controller's answers arrive."""

    log_dir: Path | None
    shown_ranks: frozenset[int]
    report: Path | None
    injections: tuple[Injection, ...]
    injection_specs: tuple[str, ...]
    save_dir: Path | None
    resume: str
    fresh: bool
    unbuffered: bool
    log_cap_bytes: int
    start: str
    zygote: Path | None
    """Socket of a resident zygote; None: the job has its own."""

    link_transport: str
    node_suspect_s: float
    token_file: Path | None
    plaintext: bool
    """Machines may talk without TLS."""

    end_signals: tuple[signal.Signals, ...]
    shutdown_timeout_s: float

    @property
    def starts_controller(self) -> bool:
        return self.first_node == 0

    @property
    def is_reachable(self) -> bool:
        """Whether other machines can reach the controller or workers of the job."""
        return not is_loopback(self.host) or bool(self.link_host and not is_loopback(self.link_host))


def read_options(parsed: Parsed, devices: Devices) -> LaunchOptions:
    """Check everything that the command line alone can tell. Raises ConfigError, one line."""
    nnodes = _nodes(parsed.text("nnodes"))
    nproc = _processes(parsed.text("nproc_per_node"), devices)
    if parsed.switch("standalone"):
        _in_reach("--nnodes x --nproc-per-node on one machine", f"{nnodes} x {nproc}", nnodes * nproc, _MAX_PROCESSES)
    host, port, standalone = _endpoint(parsed, nnodes)
    node_rank = 0 if parsed.switch("standalone") else _number(parsed, "node_rank")
    if node_rank >= nnodes:
        raise ConfigError(f"--node-rank {node_rank}: must be below --nnodes {nnodes}")
    config = _config(parsed, nnodes, nproc)
    save_dir = _path(parsed, "save_dir")
    if config.save_every and save_dir is None:
        raise ConfigError(f"--save-every {config.save_every} needs --save-dir DIR")
    resume = _resume(parsed, save_dir)
    injections = tuple(parse_injection(spec) for spec in parsed.lists["inject"])
    for spec, injection in zip(parsed.lists["inject"], injections, strict=True):
        known = config.started_workers + config.max_restarts
        if injection.worker >= known:
            raise ConfigError(f"--inject {spec}: worker={injection.worker} must be below {known}")
    _choice(parsed, "rdzv_backend", ("c10d", "static"))
    return LaunchOptions(
        config=config,
        job=_job(parsed, standalone),
        script=parsed.script,
        script_args=parsed.script_args,
        module=parsed.switch("module"),
        local_agents=nnodes if standalone else 1,
        first_node=node_rank,
        host=host,
        port=port,
        link_host=parsed.text("local_addr"),
        log_dir=_path(parsed, "log_dir"),
        shown_ranks=_ranks(parsed.text("local_ranks_filter"), nnodes * nproc),
        report=_path(parsed, "report"),
        injections=injections,
        injection_specs=parsed.lists["inject"],
        save_dir=save_dir,
        resume=resume,
        fresh=parsed.switch("fresh"),
        unbuffered=parsed.switch("unbuffered"),
        log_cap_bytes=_size(parsed, "log_cap"),
        start=_choice(parsed, "start", ("fork", "spawn")),
        zygote=_zygote(parsed),
        link_transport=_transport(parsed, standalone or nnodes == 1),
        node_suspect_s=_node_suspect_s(parsed, standalone),
        token_file=_path(parsed, "token_file"),
        plaintext=parsed.switch("plaintext"),
        end_signals=_signals(parsed.text("signals_to_handle")),
        shutdown_timeout_s=_seconds(parsed, "shutdown_timeout", least=0.0),
    )


def _config(parsed: Parsed, nnodes: int, nproc: int) -> ControllerConfig:
    pp, tp = _number(parsed, "pp", least=1), _number(parsed, "tp", least=1)
    spares = _number(parsed, "spares")
    if parsed.text("dp"):
        dp = _number(parsed, "dp", least=1)
    else:
        dp, rest = divmod(nnodes * nproc - spares, pp * tp)
        if rest or dp < 1:
            raise ConfigError(
                f"{nnodes} node(s) x {nproc} processes less --spares {spares} cannot be divided into replicas of"
                f" --pp {pp} x --tp {tp} = {pp * tp} workers: change one of them, or give --dp"
            )
    config = ControllerConfig(
        dp=dp,
        pp=pp,
        tp=tp,
        spares=spares,
        nnodes=nnodes,
        nproc_per_node=nproc,
        max_restarts=_number(parsed, "max_restarts"),
        replicas=_number(parsed, "replicas"),
        shard_elements=_number(parsed, "shard_elements", least=1),
        reduce="ring" if _choice(parsed, "reduce", REDUCE_KINDS) == "ring" else "direct",
        save_every=_number(parsed, "save_every"),
        want_report=bool(parsed.text("report")),
    )
    check_config(config)
    return config


def _nodes(text: str) -> int:
    least, colon, most = text.partition(":")
    numbers = (least, most) if colon else (least,)
    if not all(number.isascii() and number.isdigit() and int(number) >= 1 for number in numbers):
        raise ConfigError(f"--nnodes {text}: must be N or MIN:MAX, each at least 1")
    if colon and int(least) > int(most):
        raise ConfigError(f"--nnodes {text}: MIN must not be above MAX")
    return _in_reach("--nnodes", text, int(numbers[-1]), _MAX_WORKERS)


def _in_reach(flag: str, text: str, found: int, most: int) -> int:
    if found > most:
        raise ConfigError(f"{flag} {text}: must be at most {most}")
    return found


def _processes(text: str, devices: Devices) -> int:
    if text == "cpu" or (text == "auto" and not devices.gpus):
        return devices.cpus
    if text in ("gpu", "auto"):
        if not devices.gpus:
            raise ConfigError("--nproc-per-node gpu: this machine shows no GPU; give a number")
        return devices.gpus
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise ConfigError(f"--nproc-per-node {text}: must be a number from 1, cpu, gpu or auto")
    return _in_reach("--nproc-per-node", text, int(text), _MAX_PROCESSES)


def _endpoint(parsed: Parsed, nnodes: int) -> tuple[str, int, bool]:
    """(host, port, everything on this machine). torchrun's rule: --standalone ignores endpoint flags."""
    chosen = {"rdzv_endpoint", "master_addr", "master_port"} & parsed.given
    if parsed.switch("standalone"):
        return "127.0.0.1", 0, True
    if not chosen:
        if nnodes == 1:
            return "127.0.0.1", 0, True
        raise ConfigError(
            f"--nnodes {nnodes} needs --rdzv-endpoint HOST:PORT and --node-rank,"
            f" or --standalone for {nnodes} failure domains on this machine"
        )
    host, port = parsed.text("master_addr") or "127.0.0.1", parsed.text("master_port") or str(_DEFAULT_PORT)
    if parsed.text("rdzv_endpoint"):
        host, colon, given = parsed.text("rdzv_endpoint").rpartition(":")
        if not colon:
            host, given = given, str(_DEFAULT_PORT)
        port = given
    host = host.removeprefix("[").removesuffix("]")
    if not (port.isascii() and port.isdigit() and int(port) <= _MAX_PORT) or not host:
        raise ConfigError(f"endpoint {host}:{port}: must be HOST:PORT with a port from 0 to {_MAX_PORT}")
    if nnodes > 1 and int(port) == 0:
        raise ConfigError(f"endpoint {host}:0: nodes find each other by the port; give a number from 1")
    return host, int(port), False


def _job(parsed: Parsed, standalone: bool) -> str:
    name = parsed.text("rdzv_id") or parsed.text("run_id")
    if not name or name == "none":
        if not standalone and parsed.text("nnodes") not in ("1", "1:1"):
            raise ConfigError("a job on several nodes needs --rdzv-id NAME, the same on all of them")
        return ""
    if not _JOB_NAME.fullmatch(name):
        raise ConfigError(f"--rdzv-id {name!r:.80}: must be 1 to 64 letters, digits, '.', '_' or '-'")
    return name


def _resume(parsed: Parsed, save_dir: Path | None) -> str:
    resume = parsed.text("resume")
    if not resume:
        raise ConfigError("--resume '': must be auto, never or the path of a checkpoint")
    if parsed.switch("fresh") and resume not in ("auto", "never"):
        raise ConfigError(f"--fresh contradicts --resume {resume}: leave one of them out")
    if parsed.switch("fresh") and save_dir is None:
        raise ConfigError("--fresh says something about --save-dir, which is not given: leave it out or add the folder")
    return resume


def _ranks(text: str, count: int) -> frozenset[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and int(part) < count for part in parts):
        raise ConfigError(f"--local-ranks-filter {text}: must be ranks from 0 to {count - 1}, separated by commas")
    return frozenset(map(int, parts))


def _signals(text: str) -> tuple[signal.Signals, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = {item.name: item for item in signal.Signals if item not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD)}
    for name in names:
        if name not in known:
            raise ConfigError(f"--signals-to-handle {name}: must be names of signals that can be caught, as SIGTERM")
    return tuple(known[name] for name in dict.fromkeys(names))


def _transport(parsed: Parsed, one_machine: bool) -> str:
    transport = _choice(parsed, "link_transport", LINK_TRANSPORTS)
    if not one_machine:
        if transport != "tcp" and "link_transport" in parsed.given:
            raise ConfigError(f"--link-transport {transport}: nodes on several machines are connected by tcp")
        return "tcp"
    return transport


def _zygote(parsed: Parsed) -> Path | None:
    path = _path(parsed, "zygote")
    if path is not None and parsed.text("start") == "spawn":
        raise ConfigError(f"--zygote {path} forks workers, --start spawn does not: leave one of them out")
    return path


def _choice(parsed: Parsed, key: str, choices: tuple[str, ...]) -> str:
    value = parsed.text(key)
    if value not in choices:
        raise ConfigError(f"{_flag(key)} {value}: must be {' or '.join(choices)}")
    return value


def _number(parsed: Parsed, key: str, least: int = 0) -> int:
    text = parsed.text(key)
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ConfigError(f"{_flag(key)} {text}: must be a whole number from {least}")
    return int(text)


def _node_suspect_s(parsed: Parsed, standalone: bool) -> float:
    """On one machine the kernel tells of every death; late beats only mean that the machine is busy."""
    if not parsed.text("node_suspect_s"):
        return 30.0 if standalone else 3.0
    return _seconds(parsed, "node_suspect_s", least=0.3)


def _seconds(parsed: Parsed, key: str, least: float) -> float:
    text = parsed.text(key)
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value < float("inf"):
        raise ConfigError(f"{_flag(key)} {text}: must be seconds from {least:g}")
    return value


def _size(parsed: Parsed, key: str) -> int:
    found = _SIZE.fullmatch(parsed.text(key))
    if found is None:
        raise ConfigError(f"{_flag(key)} {parsed.text(key)}: must be bytes, as 500000, 64M or 2G")
    return int(found[1]) * _UNITS[found[2].lower()]


def _path(parsed: Parsed, key: str) -> Path | None:
    text = parsed.text(key)
    if not text:
        if key in parsed.given:
            raise ConfigError(f"{_flag(key)} '': must be a path")
        return None
    return Path(text).absolute()


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")
