"""Who runs the user's callbacks, and who holds a copy of their state."""

from collections.abc import Sequence

from elaswave.core.ids import WorkerId
from elaswave.core.plan import Member


def choose_callers(before: Sequence[WorkerId], members: Sequence[Member]) -> tuple[WorkerId, ...]:
    """Plan.callers for these members, who are at least one, after a plan with the callers `before`.

    The caller stays as long as it is there; then who holds its state calls, and nobody else where it is there: a worker
    that comes, or comes back, has none. The holder is on another node than the caller where there is one.
    """
    node_of = {member.worker: member.node for member in members}
    left = [worker for worker in before if worker in node_of]
    caller = left[0] if left else min(node_of)
    elsewhere = [worker for worker in node_of if node_of[worker] != node_of[caller]]
    candidates = elsewhere or [worker for worker in node_of if worker != caller]
    holder = next((worker for worker in left[1:] if worker in candidates), min(candidates, default=None))
    return (caller,) if holder is None else (caller, holder)
