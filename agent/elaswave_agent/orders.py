"""What the controller tells an agent, as values; StartWorker and FenceWorker are the core's."""

from dataclasses import dataclass, field

from elaswave.core.events import FenceWorker, StartWorker
from elaswave.core.ids import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Pass `frame` (an AgentMessage with its length) to the worker's socket, in order."""

    worker: WorkerId
    frame: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectNow:
    """A fault at once, from outside the process. action: "kill" (SIGKILL) or "stop" (SIGSTOP)."""

    worker: WorkerId
    action: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """End all workers, then leave."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerBeat:
    """Sign of life of the controller; nothing hangs on it: its loss stops no worker."""

    sequence: int


Order = StartWorker | FenceWorker | Forward | InjectNow | Shutdown | ControllerBeat
