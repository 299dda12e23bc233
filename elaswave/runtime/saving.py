"""When a worker writes its part of a durable checkpoint."""

from pathlib import Path

from elaswave.core.events import CheckpointWritten
from elaswave.core.ids import Step, WorkerId
from elaswave.core.parameters import BlockLayout
from elaswave.core.protocol.worker import StepProtocol
from elaswave.core.settings import WorkerSettings
from elaswave.progress import ProgressWriter
from elaswave.runtime.callbacks import Callbacks
from elaswave.runtime.checkpoint import write_shards, write_user_state
from elaswave.runtime.shell import ProtocolShell

SAVE_LIMIT_S = 600.0  # an idle disk needs seconds; a shared file system may stall for minutes


class CheckpointSaver:
    """Owners save at steps that are a function of the step number, so nothing has to be agreed on."""

    def __init__(
        self, settings: WorkerSettings, layout: BlockLayout, job_digest: str, progress: ProgressWriter
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._digest = job_digest
        self._progress = progress
        self._due: Step | None = None

    def step_decided(self, version: Step, last: int) -> None:
        """Version `version` is about to be made; `last` is the final one."""
        every = self._settings.save_every
        if every and self._settings.save_dir and (version % every == 0 or version == last):
            self._due = version

    def write(
        self, me: WorkerId, protocol: StepProtocol, shell: ProtocolShell, callbacks: Callbacks
    ) -> CheckpointWritten | None:
        """Write the shards owned here, if a checkpoint is due and they are at its version. Raises OSError.

        Before them the caller writes the user's state. Without all owners' parts, and the caller's, the controller
        makes no index, and the checkpoint does not exist.
        """
        version, self._due = self._due, None
        if version is None:
            return None
        save_dir, is_caller = Path(self._settings.save_dir), me == protocol.plan.caller
        groups, copies = protocol.plan.groups, protocol.copies
        mine = {
            shard: state
            for shard, state in shell.states.items()
            if groups[shard].owner == me and copies.get(shard) == version
        }
        with self._progress.long_operation(SAVE_LIMIT_S):
            if is_caller:
                write_user_state(save_dir, version, callbacks.sealed_state())
            shape, layout = protocol.job.shape, self._layout
            manifest = ""
            if mine:
                manifest = write_shards(
                    save_dir, version, me, mine, shape=shape, layout=layout, job_digest=self._digest
                )
        if not mine and not is_caller:
            return None
        shards = tuple(sorted(mine))
        return CheckpointWritten(worker=me, step=version, shards=shards, manifest=manifest, with_user_state=is_caller)
