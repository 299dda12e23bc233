"""Persisted plans, and which of them each worker has been sent."""

from collections import OrderedDict
from dataclasses import dataclass, field

from elaswave.core.events import PersistPlan
from elaswave.core.ids import Epoch, WorkerId
from elaswave.core.plan import Plan
from elaswave.errors import FaultError, InvariantError
from elaswave.wire import PlanDelta, plan_delta
from elaswave_controller.store import Store

_KEPT = 256  # plans in memory; a worker is sent plans as they are made, only a new one starts from an older epoch


@dataclass(slots=True)
class _Persisted:
    plan: Plan
    delta: PlanDelta
    whole: PlanDelta | None = field(default=None)


class PlanLog:
    """Plans go to the store by compare-and-set, then to workers as deltas, in order and without gaps."""

    def __init__(self, store: Store, job: str) -> None:
        self._store = store
        self._job = job
        self._generation = 0
        self._revision = 0
        self._plans: OrderedDict[Epoch, _Persisted] = OrderedDict()
        self._sent: dict[WorkerId, Epoch] = {}

    @property
    def _key(self) -> str:
        return f"jobs/{self._job}/{self._generation}/plan"

    @property
    def newest(self) -> Plan | None:
        """The last persisted plan."""
        return next(reversed(self._plans.values())).plan if self._plans else None

    async def persist(self, effect: PersistPlan) -> None:
        """Write the plan. Raises FaultError where another controller has written one in the meantime."""
        plan = effect.plan
        newest = self.newest
        if newest is not None and plan.epoch != newest.epoch + 1:
            raise InvariantError(f"plan {plan.epoch} was made after plan {newest.epoch}: epochs rise by one")
        delta = plan_delta(effect.previous, plan)
        value = delta.SerializeToString()
        if self._revision:
            outcome = await self._store.compare_and_set(self._key, value, self._revision)
        else:
            outcome = await self._store.create_if_absent(self._key, value)
        if not outcome.succeeded or outcome.entry is None:
            raise FaultError(f"plan {plan.epoch} was not persisted: another controller runs this job")
        self._revision = outcome.entry.revision
        self._plans[plan.epoch] = _Persisted(plan, delta)
        while len(self._plans) > _KEPT:
            self._plans.popitem(last=False)

    def take_unsent(self, worker: WorkerId, first_epoch: Epoch) -> list[PlanDelta]:
        """Deltas that bring `worker` to the newest plan, counted as sent from now on.

        The first one that a worker gets is a whole plan, of `first_epoch` or of the oldest epoch that is kept.
        """
        if not self._plans:
            return []
        oldest, newest = next(iter(self._plans)), next(reversed(self._plans))
        sent = self._sent.get(worker)
        if sent is None:
            start = max(first_epoch, oldest)
            if start > newest:
                return []
            deltas = [self._whole(start)]
        else:
            start = sent
            if start + 1 < oldest:
                raise InvariantError(f"worker {worker} is at plan {sent}, the oldest that is kept is {oldest}")
            deltas = []
        deltas += [self._plans[Epoch(epoch)].delta for epoch in range(start + 1, newest + 1)]
        self._sent[worker] = newest
        return deltas

    def forget(self, worker: WorkerId) -> None:
        """The worker is gone for good."""
        self._sent.pop(worker, None)

    def start_over(self) -> None:
        """All workers are known to be dead: a new generation of plans starts from nothing, under a key of its own."""
        self._generation += 1
        self._revision = 0
        self._plans.clear()
        self._sent.clear()

    def _whole(self, epoch: Epoch) -> PlanDelta:
        persisted = self._plans[epoch]
        if persisted.whole is None:
            persisted.whole = plan_delta(None, persisted.plan)
        return persisted.whole
