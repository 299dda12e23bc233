"""An explicit-state world: a crew of workers, and a controller that acts on what it knows, with a budget of harm."""

from dataclasses import dataclass
from typing import NamedTuple, Self

from elaswave.core.events import WorkerReport
from elaswave.core.ids import ShardId, Step, WorkerId
from elaswave.core.plan import Plan
from elaswave.core.planner.context import MemberReport, PlanningContext
from elaswave.core.planner.reductions import with_reduce_plans
from elaswave.core.protocol.state import JobFacts
from elaswave.core.protocol.worker import StepProtocol
from elaswave.sim.crew import Crew
from elaswave.sim.scene import Scene


class Action(NamedTuple):
    """Something that can happen in a world."""

    name: str
    args: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"{self.name}{self.args}".replace(",)", ")")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much harm may still be done."""

    crashes: int
    suspicions: int
    swaps: int
    cuts: int


class World(Crew):
    """The crew of a scene and what its controller knows."""

    def __init__(self, scene: Scene, protocol: type[StepProtocol] = StepProtocol) -> None:
        self.scene = scene
        self.context = PlanningContext(
            shape=scene.shape(),
            stages=scene.stages(),
            replicas=scene.replicas,
            micro_batches=scene.micro_batches,
            reduce=scene.reduce,
        )
        self.reports: dict[WorkerId, MemberReport] = {}
        self.swaps: frozenset[tuple[ShardId, WorkerId]] = frozenset()
        self.uneven = False
        self.joining: frozenset[int] = frozenset()
        self.budget = Budget(crashes=scene.crashes, suspicions=scene.suspicions, swaps=scene.swaps, cuts=scene.cuts)
        self.over: str | None = None
        self.owed: tuple[int, list[Action]] = (-1, [])
        """What the controller owed at a version of its knowledge."""
        self.seen: frozenset[str] = frozenset()
        self.unheard: set[int] = set()
        self._plan_marks: list[int] = []
        job = JobFacts(
            shape=self.context.shape, micro_batches=scene.micro_batches, start_step=Step(0), steps=scene.steps
        )
        first = with_reduce_plans(self.context, None, scene.plan(), job.start_step)
        super().__init__(job, first, protocol, scene.log_cap)
        for index in range(scene.workers):
            self.hear(index)

    def push(self, plan: Plan) -> None:
        """Persist the next plan, with the reduce plans that its changes make necessary."""
        fastest = max(self.step_known(index) for index in plan.ids)
        super().push(with_reduce_plans(self.context, self.plan, plan, fastest))

    def changed(self, index: int) -> None:
        """The worker may have something to tell."""
        self.unheard.add(index)

    def step_known(self, index: int) -> Step:
        """The step that the controller knows of."""
        report = self.reports.get(WorkerId(index))
        return report.step if report is not None else self.job.start_step

    def hear(self, index: int) -> None:
        """The worker's report, as of now, reaches the controller."""
        self.version += 1
        self.unheard.discard(index)
        worker = WorkerId(index)
        self.reports[worker] = merge_report(self.reports.get(worker), self.workers[index].protocol.report())

    def has_news(self, index: int) -> bool:
        """The worker's report would tell the controller something."""
        if index not in self.unheard or index not in self.workers:
            return False
        known = self.reports.get(WorkerId(index))
        protocol = self.workers[index].protocol
        if known is not None and not protocol.adoptions and merge_report(known, protocol.report()) == known:
            self.unheard.discard(index)
            return False
        return True

    # ------------------------------------------------------------------ exploration

    def clone(self) -> Self:
        """An independent copy; workers are shared until one side changes them."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        for name in (
            "plans",
            "_plan_marks",
            "net",
            "early",
            "reports",
            "decisions",
            "workers",
            "_marks",
            "_ready",
            "unheard",
        ):
            setattr(other, name, getattr(self, name).copy())
        self._own = set()
        other._own = set()
        return other

    def fingerprint(self) -> int:
        """Hash of everything that future behaviour and its checks depend on."""
        shells: list[tuple[int, int]] = []
        epoch, step = len(self.plans), self.scene.steps
        for index, shell in sorted(self.workers.items()):
            if self.up(index):
                mark = self._marks.get(index)
                if mark is None:
                    mark = self._marks[index] = shell.fingerprint()
                shells.append((index, mark))
                epoch, step = min(epoch, shell.protocol.plan.epoch), min(step, shell.protocol.step)
        budget = self.budget
        rest = (
            (budget.crashes, budget.suspicions, budget.swaps, budget.cuts),
            (self.over is not None, self.uneven, self.swaps, self.joining, self.ever_excluded, self.down),
            frozenset(self.net.items()),
            frozenset(self.early.items()),
            (len(self.plans), self._marks_of_plans(epoch)),
            frozenset(found for found in self.run_hops if found[0] >= step),
            self.evened,
        )
        return hash((tuple(shells), rest, self._knowledge()))

    def _marks_of_plans(self, first: int) -> tuple[int, ...]:
        """Plans from epoch `first` on: somebody follows them, or will."""
        self._plan_marks += [_plan_mark(plan) for plan in self.plans[len(self._plan_marks) :]]
        return tuple(self._plan_marks[first - 1 :])

    def _knowledge(self) -> tuple[object, ...]:
        """What the controller may base a plan on; where it hears at once, only what the workers no longer tell."""
        gates = set(self.plan.gates.values())
        return tuple(
            (worker, tuple((epoch, report.adopted_at.get(epoch)) for epoch in sorted(gates)))
            + ((_report_mark(report),) if self.scene.late_reports else ())
            for worker, report in sorted(self.reports.items())
        )


def _report_mark(report: MemberReport) -> tuple[object, ...]:
    tables = (frozenset(report.versions.items()), frozenset(report.reduced.items()))
    return (report.epoch, report.step, report.hosted_ready, report.finished, *tables)


def _plan_mark(plan: Plan) -> int:
    """Plans of one epoch may differ between branches of a search."""
    return hash(
        (
            tuple(sorted(plan.ids)),
            tuple((table.first_step, table.routes) for table in plan.tables),
            plan.groups,
            plan.finished,
            frozenset(plan.hosting.items()),
            frozenset(plan.queries.items()),
            frozenset(plan.gates.items()),
            frozenset(plan.reduce_plans.items()),
        )
    )


def merge_report(before: MemberReport | None, report: WorkerReport) -> MemberReport:
    """The controller's knowledge of a member after one more report."""
    adopted = dict(before.adopted_at) if before is not None else {}
    adopted.update(report.adoptions)
    return MemberReport(
        epoch=report.epoch,
        step=report.step,
        adopted_at=adopted,
        versions={held.shard: held.version for held in report.held},
        reduced={held.shard: held.reduced for held in report.held},
        hosted_ready=report.hosted_ready,
        finished=report.finished,
    )
