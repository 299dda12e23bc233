"""Where a worker's parameters and optimizer states come from at the first plan: initial values or a checkpoint."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from elaswave.core.events import JobDescription
from elaswave.core.ids import BlockId, ShardId
from elaswave.core.parameters import BlockLayout
from elaswave.core.plan import Plan
from elaswave.core.settings import WorkerSettings
from elaswave.core.shape import ModelShape, Shard, divide_into_shards
from elaswave.errors import ConfigError, InvariantError
from elaswave.job import Job
from elaswave.runtime.checkpoint import CheckpointReader
from elaswave.runtime.model import PARAMETER_DTYPES, HostedModel, initial_blocks
from elaswave.runtime.shards import ShardState, initial_state, parameters_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The job as it is announced, and the checkpoint that it goes on from, if any."""

    job: Job
    description: JobDescription
    layout: BlockLayout
    checkpoint: CheckpointReader | None

    def load(self, shape: ModelShape, copies: Iterable[ShardId], model: HostedModel) -> dict[ShardId, ShardState]:
        """States of these shards at the start version; hosted parameters are overwritten where a checkpoint rules."""
        dtype = PARAMETER_DTYPES[self.job.parameter_dtype]
        if self.checkpoint is None:
            self._install_tied(model)
            return self._initial(shape, copies)
        for shard in shape.shards:
            if model.hosts_block(shard.block):
                model.install(shard, parameters_of(self.checkpoint.read(shard), dtype))
        return {shard: self.checkpoint.read(shape.shards[shard]) for shard in copies}

    def user_state(self) -> Tensor | None:
        """The user's declared state in the checkpoint, sealed; None without either."""
        return None if self.checkpoint is None else self.checkpoint.user_state()

    @property
    def other_settings(self) -> bool:
        """The checkpoint was written by a job whose settings give other bits."""
        return self.checkpoint is not None and self.checkpoint.job_digest != self.description.digest

    def _install_tied(self, model: HostedModel) -> None:
        """A tied block starts from its group's first layer, which need not be hosted here."""
        blocks = enumerate(self.layout.blocks)
        tied = [BlockId(i) for i, block in blocks if len(block.layers) > 1 and model.hosts_block(BlockId(i))]
        for block, values in initial_blocks(self.job, self.layout, tied):
            model.block(block).copy_(values)

    def _initial(self, shape: ModelShape, copies: Iterable[ShardId]) -> dict[ShardId, ShardState]:
        by_block: dict[BlockId, list[ShardId]] = {}
        for shard in copies:
            by_block.setdefault(shape.shards[shard].block, []).append(shard)
        states: dict[ShardId, ShardState] = {}
        for block, values in initial_blocks(self.job, self.layout, by_block):
            for shard in by_block[block]:
                piece = shape.shards[shard]
                states[shard] = initial_state(self.job.optimizer, values[piece.start : piece.stop])
        return states


def find_start(job: Job, description: JobDescription, layout: BlockLayout, settings: WorkerSettings) -> Start:
    """Raises ConfigError where the checkpoint does not fit the job."""
    if not settings.resume_from:
        return Start(job=job, description=description, layout=layout, checkpoint=None)
    reader = CheckpointReader.open(Path(settings.resume_from), job, layout)
    if reader.step >= job.steps:
        raise ConfigError(
            f"checkpoint {settings.resume_from} is at step {reader.step} of {job.steps}: "
            "nothing is left to do, ask for more steps"
        )
    resumed = replace(description, start_step=reader.step, resume_from=settings.resume_from)
    return Start(job=job, description=resumed, layout=layout, checkpoint=reader)


def shards_of_plan(layout: BlockLayout, plan: Plan, least: int) -> tuple[Shard, ...]:
    """The division into shards, each of about `least` elements or more, that a plan was made for.

    Its number of groups determines it: more parts never give fewer shards, and equally many only where the division is
    the same.
    """
    wanted = len(plan.groups)
    for parts in range(1, wanted + 1):
        shards = divide_into_shards(layout.blocks, parts, least)
        if len(shards) == wanted:
            return shards
        if len(shards) > wanted:
            break
    raise InvariantError(f"no division of {len(layout.blocks)} blocks has the {wanted} shards of plan {plan.epoch}")
