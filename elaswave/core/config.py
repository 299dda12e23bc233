"""What the controller is told before it starts: the shape of the job, from the launcher's flags. Values only."""

from dataclasses import dataclass

from elaswave.core.ids import WorkerId
from elaswave.core.layout import MAX_TP
from elaswave.core.reduce_plan import REDUCE_KINDS, ReduceKind
from elaswave.core.shape import SHARD_ELEMENTS
from elaswave.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerConfig:
    """Shape and policies of one job. Checked by `check_config`, not by the constructor."""

    dp: int
    """Stage replicas of each stage: how many times the model is held."""

    pp: int
    """Pipeline stages."""

    tp: int = 1
    """Workers of one stage replica."""

    spares: int = 0
    """Workers beyond the layout that wait warm; they join at a later step boundary when a worker is lost."""

    nnodes: int = 1
    """Agents that the controller waits for before it starts the first worker."""

    nproc_per_node: int = 1
    """Workers of each agent."""

    max_restarts: int = 0
    """How often a worker may be started again after its death, counted over the whole job."""

    replicas: int = 1
    """Copies of each shard of optimizer state beside its owner (r). 0: a lost owner means a durable checkpoint."""

    shard_elements: int = SHARD_ELEMENTS
    """Least length of a shard: smaller layers are not divided among their hosts."""

    reduce: ReduceKind = "direct"
    """How partial sums get to the owners of shards."""

    save_every: int = 0
    """Steps between durable checkpoints; 0: none."""

    want_report: bool = False
    """Ask the workers for the digest of all parameters after the last step."""

    allow_fresh_start: bool = True
    """Whether step 0 is a legal start; False when a durable checkpoint exists that a job must not ignore."""

    nodes_return: bool = True
    """Whether somebody may start the agent of a lost node again; with --standalone nobody does."""

    suspect_grace_s: float = 10.0
    """Seconds for which a suspected worker may stay silent before it is fenced."""

    start_limit_s: float = 300.0
    """Seconds from the first agent to the first step within which all workers have to be ready."""

    first_worker: WorkerId = WorkerId(0)
    """First worker id to give; above 0 after a restart of the whole job, as ids are never used again."""

    restarts_used: int = 0
    """Restarts that earlier generations of this job have used up."""

    @property
    def layout_workers(self) -> int:
        """Workers that the layout needs."""
        return self.dp * self.pp * self.tp

    @property
    def started_workers(self) -> int:
        """Workers that the agents start."""
        return self.nnodes * self.nproc_per_node


def check_config(config: ControllerConfig) -> None:
    """Raises ConfigError, one line, where the numbers do not fit each other. Layers are checked when they are known."""
    positive = {
        "--dp": config.dp,
        "--pp": config.pp,
        "--tp": config.tp,
        "--nnodes": config.nnodes,
        "--nproc-per-node": config.nproc_per_node,
        "--shard-elements": config.shard_elements,
    }
    natural = {
        "--spares": config.spares,
        "--max-restarts": config.max_restarts,
        "--replicas": config.replicas,
        "--save-every": config.save_every,
    }
    for flag, value in positive.items():
        if value < 1:
            raise ConfigError(f"{flag} {value}: must be at least 1")
    for flag, value in natural.items():
        if value < 0:
            raise ConfigError(f"{flag} {value}: must be at least 0")
    if config.reduce not in REDUCE_KINDS:
        raise ConfigError(f"--reduce {config.reduce}: must be {' or '.join(REDUCE_KINDS)}")
    if config.tp > MAX_TP:
        raise ConfigError(
            f"--tp {config.tp}: tensor parallelism is not supported, a stage replica has {MAX_TP} worker in this "
            f"version; use --tp {MAX_TP}"
        )
    _check_fit(config)


def _check_fit(config: ControllerConfig) -> None:
    needed = config.layout_workers + config.spares
    have = config.started_workers
    if needed == have:
        return
    layout = f"--dp {config.dp} --pp {config.pp} --tp {config.tp} --spares {config.spares}"
    source = f"{config.nnodes} node(s) x {config.nproc_per_node} processes = {have}"
    if needed > have:
        raise ConfigError(
            f"{layout} needs {needed} workers but {source}: start more workers or make the layout smaller"
        )
    raise ConfigError(f"{layout} uses {needed} workers but {source}: add --spares {have - config.layout_workers}")
