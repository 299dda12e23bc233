"""What an operator sees of a job. The values of one step and of one incident are in elaswave.core.events."""

from dataclasses import dataclass

from elaswave.core.events import Incident
from elaswave.core.ids import Epoch, Layer, NodeId, Step, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker. `pid` 0: no process. `layers`: hosted by the newest plan. `step`: the highest reported."""

    worker: WorkerId
    pid: int
    node: NodeId
    local_index: int
    incarnation: int
    state: str
    layers: tuple[Layer, ...] = ()
    step: Step = Step(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """The job as its controller sees it. `steps`: how many there will be; 0 while not known."""

    job: str
    epoch: Epoch
    step: Step
    steps: int
    state: str
    workers: tuple[WorkerStatus, ...] = ()
    incidents: tuple[Incident, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The job is over: 0 done, 1 failed, 75 requeue, 93 refused before the first step."""

    exit_code: int
    message: str
