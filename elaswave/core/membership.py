"""Life of a worker process as the controller sees it: a literal table."""

from dataclasses import dataclass, field
from enum import Enum

from elaswave.core.events import Progress
from elaswave.core.ids import NodeId, WorkerId
from elaswave.core.plan import Member
from elaswave.errors import InvariantError


class WorkerState(Enum):
    """STARTING: no sign of readiness yet. WARM: ready, not in the plan. MEMBER: in the plan.

    SUSPECTED: excluded, may come back. FENCED: told to die. GONE: confirmed dead.
    """

    STARTING = "starting"
    WARM = "warm"
    MEMBER = "member"
    SUSPECTED = "suspected"
    FENCED = "fenced"
    GONE = "gone"


class Trigger(Enum):
    """What can happen to a worker."""

    READY = "ready"
    ADMITTED = "admitted"
    SUSPECTED = "suspected"
    CLEARED = "cleared"
    FENCED = "fenced"
    EXITED = "exited"


_S, _T = WorkerState, Trigger
TRANSITIONS: dict[tuple[WorkerState, Trigger], WorkerState] = {
    (_S.STARTING, _T.READY): _S.WARM,
    (_S.STARTING, _T.SUSPECTED): _S.STARTING,
    (_S.STARTING, _T.CLEARED): _S.STARTING,
    (_S.STARTING, _T.FENCED): _S.FENCED,
    (_S.STARTING, _T.EXITED): _S.GONE,
    (_S.WARM, _T.ADMITTED): _S.MEMBER,
    (_S.WARM, _T.SUSPECTED): _S.SUSPECTED,
    (_S.WARM, _T.CLEARED): _S.WARM,
    (_S.WARM, _T.FENCED): _S.FENCED,
    (_S.WARM, _T.EXITED): _S.GONE,
    (_S.MEMBER, _T.SUSPECTED): _S.SUSPECTED,
    (_S.MEMBER, _T.CLEARED): _S.MEMBER,
    (_S.MEMBER, _T.FENCED): _S.FENCED,
    (_S.MEMBER, _T.EXITED): _S.GONE,
    (_S.SUSPECTED, _T.SUSPECTED): _S.SUSPECTED,
    (_S.SUSPECTED, _T.CLEARED): _S.WARM,
    (_S.SUSPECTED, _T.FENCED): _S.FENCED,
    (_S.SUSPECTED, _T.EXITED): _S.GONE,
    (_S.FENCED, _T.SUSPECTED): _S.FENCED,
    (_S.FENCED, _T.CLEARED): _S.FENCED,
    (_S.FENCED, _T.READY): _S.FENCED,
    (_S.FENCED, _T.FENCED): _S.FENCED,
    (_S.FENCED, _T.EXITED): _S.GONE,
    (_S.GONE, _T.EXITED): _S.GONE,
    (_S.GONE, _T.SUSPECTED): _S.GONE,
    (_S.GONE, _T.CLEARED): _S.GONE,
    (_S.GONE, _T.FENCED): _S.GONE,
    (_S.GONE, _T.READY): _S.GONE,
}
"""What is not here is a bug; late news of the dead are legal and change nothing."""


@dataclass(slots=True, kw_only=True)
class WorkerRecord:
    """One process. `admitted_once`: has been in a plan, so it keeps protocol state and adopts plans in order."""

    worker: WorkerId
    node: NodeId
    local_index: int
    incarnation: int
    state: WorkerState = WorkerState.STARTING
    address: str = ""
    pid: int = 0
    admitted_once: bool = False
    fence_at: float | None = None
    progress: Progress = field(default_factory=Progress)

    def move(self, trigger: Trigger) -> None:
        """Take a transition. Raises InvariantError, state unchanged, where the table has none."""
        target = TRANSITIONS.get((self.state, trigger))
        if target is None:
            raise InvariantError(f"worker {self.worker} is {self.state.value}: {trigger.value} cannot happen to it")
        self.state = target

    def member(self) -> Member:
        """This worker as a plan names it."""
        return Member(
            worker=self.worker,
            node=self.node,
            local_index=self.local_index,
            incarnation=self.incarnation,
            address=self.address,
        )

    @property
    def name(self) -> str:
        """For people: worker 3 (node0/3)."""
        again = f", start {self.incarnation + 1}" if self.incarnation else ""
        return f"worker {self.worker} ({self.node}/{self.local_index}{again})"
