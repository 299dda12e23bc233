"""The flags of elaswave-launch: torchrun's, in both spellings and from PET_* variables, and ours.

One table, so that parser, help, documentation and the golden test cannot drift apart. All values are texts here;
options.py gives them meaning.
"""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn

from elaswave.core.shape import SHARD_ELEMENTS
from elaswave.errors import ConfigError


class Kind(Enum):
    """How a flag takes its value."""

    TEXT = "text"
    SWITCH = "switch"
    LIST = "list"


class Support(Enum):
    """What we do with a flag of torchrun's."""

    USED = "used"
    NOTED = "noted"  # accepted, does nothing, said so in one line
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag. `reason` says for NOTED and REFUSED flags why, and what to use instead."""

    name: str
    help: str
    default: str = ""
    kind: Kind = Kind.TEXT
    metavar: str = "VALUE"
    short: str = ""
    environment: bool = True
    support: Support = Support.USED
    reason: str = ""

    @property
    def key(self) -> str:
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def spellings(self) -> tuple[str, ...]:
        underscored = "--" + self.key
        names = (self.name,) if underscored == self.name else (self.name, underscored)
        return (self.short, *names) if self.short else names

    @property
    def variable(self) -> str:
        """The environment variable that stands in for the flag; empty where none does."""
        return f"PET_{self.key.upper()}" if self.environment else ""


def _ours(name: str, text: str, default: str = "", **more: str) -> Flag:
    return Flag(name=name, help=text, default=default, environment=False, metavar=more.get("metavar", "N"))


def _noted(name: str, reason: str, kind: Kind = Kind.TEXT, short: str = "") -> Flag:
    return Flag(name=name, help="accepted and ignored: " + reason, kind=kind, short=short,
                support=Support.NOTED, reason=reason)  # fmt: skip


def _refused(name: str, reason: str, kind: Kind = Kind.TEXT, environment: bool = True) -> Flag:
    return Flag(name=name, help="refused: " + reason, kind=kind, environment=environment,
                support=Support.REFUSED, reason=reason)  # fmt: skip


TORCHRUN_FLAGS: tuple[Flag, ...] = (
    Flag(name="--nnodes", default="1", metavar="N|MIN:MAX",
         help="nodes of the job; with --standalone, failure domains on this machine; MIN:MAX starts with MAX"),
    Flag(name="--nproc-per-node", default="1", metavar="N", help="workers of each node: a number, cpu, gpu or auto"),
    Flag(name="--node-rank", default="0", metavar="R", help="rank of this node; node 0 runs the controller"),
    Flag(name="--rdzv-endpoint", metavar="HOST:PORT", help="where the controller listens, the same on all nodes"),
    Flag(name="--master-addr", metavar="HOST", help="as the host of --rdzv-endpoint"),
    Flag(name="--master-port", metavar="PORT", help="as the port of --rdzv-endpoint"),
    Flag(name="--local-addr", metavar="HOST", help="address of this node on which its workers accept links"),
    Flag(name="--rdzv-id", metavar="ID", help="name of the job; by default a random one"),
    Flag(name="--run-id", metavar="ID", help="the same as --rdzv-id"),
    Flag(name="--rdzv-backend", default="c10d", metavar="NAME",
         help="c10d or static; the controller does its work either way"),
    Flag(name="--standalone", kind=Kind.SWITCH, help="the whole job on this machine, on a free port"),
    Flag(name="--max-restarts", default="0", metavar="N",
         help="workers that may be started again after their death, counted over the whole job"),
    Flag(name="--module", short="-m", kind=Kind.SWITCH, help="SCRIPT is a module name, as with python -m"),
    Flag(name="--run-path", kind=Kind.SWITCH, help="accepted: scripts always run inside the worker's interpreter"),
    Flag(name="--log-dir", metavar="DIR", help="keep logs as DIR/<job>/<node>/rank_<r>.{out,err}"),
    Flag(name="--local-ranks-filter", default="0", metavar="R,R…",
         help="ranks whose standard output is shown here (of the whole job; empty: none)"),
    Flag(name="--signals-to-handle", default="SIGTERM,SIGINT,SIGHUP,SIGQUIT", metavar="SIG,SIG…",
         help="signals that end the job"),
    Flag(name="--shutdown-timeout", default="4", metavar="SECONDS",
         help="time for an orderly end after a signal; then everything is killed"),
    _noted("--rdzv-conf", "the controller needs no rendezvous settings"),
    _noted("--monitor-interval", "processes are watched by the kernel's events, not by polling"),
    _noted("--start-method", "see --start for how workers are started"),
    _noted("--event-log-handler", "see --report and `elaswave incidents`"),
    _noted("--role", "workers have one role"),
    _noted("--redirects", "output always goes to the log folder", short="-r"),
    _noted("--tee", "see --local-ranks-filter for what is shown here", short="-t"),
    _noted("--duplicate-stdout-filters", "filter the files in the log folder"),
    _noted("--duplicate-stderr-filters", "filter the files in the log folder"),
    _refused("--no-python", "workers run Python scripts that call elaswave.train(); give a script or -m MODULE",
             kind=Kind.SWITCH),
    _refused("--logs-specs", "use --log-dir", environment=False),
    _refused("--numa-binding", "bind the launcher itself (numactl, taskset or srun); workers inherit it",
             environment=False),
    _refused("--virtual-local-rank", "devices are chosen by LOCAL_RANK", kind=Kind.SWITCH),
)  # fmt: skip

OUR_FLAGS: tuple[Flag, ...] = (
    _ours("--dp", "replicas of the model; by default as many as the workers allow"),
    _ours("--pp", "pipeline stages", "1"),
    _ours("--tp", "workers of one stage replica", "1"),
    _ours("--spares", "workers beyond the layout that wait warm and replace lost ones", "0"),
    _ours("--replicas", "copies of the optimizer state beside its owner, in other nodes", "1"),
    _ours("--shard-elements", "least length of a shard: smaller layers are not divided among their hosts",
          str(SHARD_ELEMENTS)),
    _ours("--reduce", "direct: hosts send sums to the owner of a shard; ring: they add them up on the way", "direct",
          metavar="direct|ring"),
    _ours("--report", "write the report of the run here, JSON (docs/report.md)", metavar="FILE"),
    Flag(name="--inject", kind=Kind.LIST, environment=False, metavar="SPEC",
         help="a fault: kill|stop|slow:worker=W,step=K,phase=PH[,factor=F][,during=recovery]; may be repeated"),
    _ours("--save-every", "steps between durable checkpoints; 0: none", "0"),
    _ours("--save-dir", "folder of durable checkpoints", metavar="DIR"),
    _ours("--resume", "auto: from the newest checkpoint of --save-dir; PATH: from this one; never", "auto",
          metavar="auto|PATH|never"),
    Flag(name="--fresh", kind=Kind.SWITCH, environment=False,
         help="start at step 0 although --save-dir holds checkpoints"),
    Flag(name="--unbuffered", kind=Kind.SWITCH, environment=False,
         help="links without buffers: a send waits for its receiver (finds schedules that would deadlock on NCCL)"),
    _ours("--log-cap", "host memory of a worker's boundary log, with suffix K, M or G; 0: no limit", "0",
          metavar="BYTES"),
    _ours("--start", "fork: workers from a process that has imported torch; spawn: each from scratch", "fork",
          metavar="fork|spawn"),
    _ours("--zygote", "fork workers from the resident zygote that serves at this socket (docs/launch.md)",
          metavar="SOCKET"),
    _ours("--link-transport", "how workers of one machine are connected", "shared", metavar="shared|unix|tcp"),
    _ours("--node-suspect-s", "seconds without a beat until a node is lost (default: 3, --standalone 30)", "",
          metavar="SECONDS"),
    _ours("--token-file", "secret shared by all nodes of a job on several machines", metavar="FILE"),
    Flag(name="--plaintext", kind=Kind.SWITCH, environment=False,
         help="let machines talk without TLS, on a network that you trust (docs/launch.md)"),
)  # fmt: skip

EXAMPLES = """\
examples:
  8 workers on this machine in 4 failure domains, 4 replicas of a model in 2 stages:
    elaswave-launch --standalone --nnodes 4 --nproc-per-node 2 --dp 4 --pp 2 train.py --steps 100
  the same, and worker 3 is killed in the backward pass of step 10:
    elaswave-launch --standalone --nnodes 4 --nproc-per-node 2 --dp 4 --pp 2 \\
      --inject kill:worker=3,step=10,phase=backward --report report.json train.py
  two machines, 8 workers each; the same command on both but for the node rank:
    elaswave-launch --nnodes 2 --nproc-per-node 8 --node-rank 0 --rdzv-endpoint 10.0.0.1:29500 \\
      --rdzv-id run7 --token-file ~/.elaswave-token --pp 2 train.py
    with ELASWAVE_TLS_CERTIFICATE, _KEY and _AUTHORITY set to PEM files, or with --plaintext
  a durable checkpoint every 50 steps, going on from the newest one after a crash:
    elaswave-launch --standalone --nproc-per-node 4 --save-every 50 --save-dir ckpt train.py

exit codes: 0 done, 1 failed while running, 93 refused before the first step (do not requeue),
128 + N ended by signal N.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """Raw values of the command line. `given` holds the keys that were set, by flag or by environment."""

    values: Mapping[str, str]
    switches: frozenset[str]
    lists: Mapping[str, tuple[str, ...]]
    given: frozenset[str]
    script: str
    script_args: tuple[str, ...]

    def text(self, key: str) -> str:
        return self.values[key]

    def switch(self, key: str) -> bool:
        return key in self.switches


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser; unset flags are None, so that the environment can stand in for them."""
    parser = _Parser(
        prog="elaswave-launch",
        description="Train on, bit for bit, when workers fail. Takes torchrun's flags.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    used = [flag for flag in TORCHRUN_FLAGS if flag.support is Support.USED]
    others = [flag for flag in TORCHRUN_FLAGS if flag.support is not Support.USED]
    groups = (
        ("as with torchrun (both spellings, - and _; PET_NNODES and so on from the environment)", used),
        ("ElasWave", list(OUR_FLAGS)),
        ("torchrun's that have no use here", others),
    )
    for title, flags in groups:
        group = parser.add_argument_group(title)
        for flag in flags:
            _add(group, flag)
    parser.add_argument("script", metavar="SCRIPT", help="the training script, or a module name with -m")
    parser.add_argument("script_args", metavar="ARGS", nargs=argparse.REMAINDER, help="passed to the script")
    return parser


def _add(group: "argparse._ArgumentGroup", flag: Flag) -> None:
    default = f" (default {flag.default})" if flag.default else ""
    text = (flag.help + default).replace("%", "%%")
    if flag.kind is Kind.SWITCH:
        group.add_argument(*flag.spellings, dest=flag.key, action="store_true", default=None, help=text)
    elif flag.kind is Kind.LIST:
        group.add_argument(*flag.spellings, dest=flag.key, action="append", metavar=flag.metavar, help=text)
    else:
        group.add_argument(*flag.spellings, dest=flag.key, metavar=flag.metavar, help=text)


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Parsed:
    """Parse a command line. Raises ConfigError, one line; SystemExit(0) after --help."""
    parser = build_parser()
    _refuse_unknown(arguments)
    found: dict[str, object] = vars(parser.parse_args(list(arguments)))
    values: dict[str, str] = {}
    switches: set[str] = set()
    lists: dict[str, tuple[str, ...]] = {}
    given: set[str] = set()
    for flag in (*TORCHRUN_FLAGS, *OUR_FLAGS):
        value = found[flag.key]
        if value is None and flag.variable:
            value = environment.get(flag.variable) or None
        if value is not None:
            given.add(flag.key)
        if flag.kind is Kind.SWITCH:
            if _is_on(flag, value):
                switches.add(flag.key)
        elif flag.kind is Kind.LIST:
            lists[flag.key] = tuple(value) if isinstance(value, list) else ()
        else:
            values[flag.key] = flag.default if value is None else str(value)
        if flag.support is Support.REFUSED and flag.key in given and value not in ("0", ""):
            raise ConfigError(f"{flag.name} is not supported: {flag.reason}")
    script_args = found["script_args"]
    rest = tuple(map(str, script_args)) if isinstance(script_args, list) else ()
    return Parsed(
        values=values,
        switches=frozenset(switches),
        lists=lists,
        given=frozenset(given),
        script=str(found["script"]),
        script_args=rest,
    )


def notes(parsed: Parsed) -> list[str]:
    """One line for each flag that was given and does nothing, or not quite what torchrun does."""
    least, _, most = parsed.text("nnodes").partition(":")
    elastic = [f"--nnodes {least}:{most}: the job starts with {most} nodes and goes on with fewer"]
    return (elastic if most and most != least else []) + [
        f"{flag.name} is ignored: {flag.reason}"
        for flag in TORCHRUN_FLAGS
        if flag.support is Support.NOTED and flag.key in parsed.given
    ]


def _is_on(flag: Flag, value: object) -> bool:
    if value is None or value is True:
        return value is True
    if value in ("0", "1"):
        return value == "1"
    raise ConfigError(f"{flag.variable}={value}: must be 0 or 1")


def _refuse_unknown(arguments: Sequence[str]) -> None:
    """argparse would take the value of an unknown flag for the script: name the flag instead."""
    flags = {spelling: flag for flag in (*TORCHRUN_FLAGS, *OUR_FLAGS) for spelling in flag.spellings}
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == "--" or not argument.startswith("-") or argument in ("-h", "--help"):
            return
        name, equals, _ = argument.partition("=")
        known = flags.get(name) or flags.get(argument[:2] if not argument.startswith("--") else "")
        if known is None:
            close = difflib.get_close_matches(name, flags, n=1)
            hint = f": did you mean {close[0]}?" if close else ": see elaswave-launch --help"
            raise ConfigError(f"unknown flag {name}{hint}")
        attached = bool(equals) or (known.short == argument[:2] and len(argument) > len(known.short))
        position += 1 if known.kind is Kind.SWITCH or attached else 2
