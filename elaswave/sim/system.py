"""The whole system, symbolically: the project's own controller and worker protocols with everything between them.

The controller hears what the agents tell of a worker in order, at any later time; workers report when the runtime does.
A violation is a broken promise of the protocol (see Crew), of the order of the controller's effects or of its plans, or
that something is waited for for ever.
"""

from dataclasses import dataclass

from elaswave.core import events as ev
from elaswave.core.config import ControllerConfig
from elaswave.core.controller import Controller
from elaswave.core.facts import Parameters, State
from elaswave.core.ids import Epoch, NodeId, WorkerId
from elaswave.core.membership import WorkerState
from elaswave.core.plan import Plan
from elaswave.core.protocol.state import JobFacts
from elaswave.core.protocol.worker import StepProtocol
from elaswave.core.routes import uncovered_layers
from elaswave.core.shape import CHUNK_ELEMENTS
from elaswave.sim.crew import Crew
from elaswave.sim.shell import Violation
from elaswave.sim.world import Action

_MOMENT_S = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Harm:
    """What may still be done: SIGKILLs, suspicions of live workers (stopped, or only slow), suspects that are fenced
    before they are cleared, links that lose what is in flight, whole nodes."""

    crashes: int = 0
    suspicions: int = 0
    fences: int = 0
    cuts: int = 0
    nodes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemScene:
    """A job under the launcher. Every layer has as many shards as there are pipelines."""

    config: ControllerConfig
    harm: Harm
    layers: int = 2
    micro_batches: int = 4
    steps: int = 3

    def job(self) -> ev.JobDescription:
        """What the workers' script asks for."""
        parameter = ev.ParameterDescription(name="w", shape=(self.config.dp * CHUNK_ELEMENTS,))
        layers = ((parameter,),) * self.layers
        return ev.JobDescription(layers=layers, steps=self.steps, micro_batches=self.micro_batches, digest="job")


class System(Crew):
    """Controller, agents, workers, links."""

    def __init__(
        self,
        scene: SystemScene,
        protocol: type[StepProtocol] = StepProtocol,
        controller: type[Controller] = Controller,
    ) -> None:
        self.scene = scene
        self.harm = scene.harm
        self.controller = controller(scene.config)
        self.now = 0.0
        self.node_of: dict[int, NodeId] = {}
        self.told: dict[int, list[ev.Event]] = {}
        self.lost_nodes: list[NodeId] = []
        self.absent_nodes: list[NodeId] = []
        self.waiting: set[int] = set()
        self.stopped: set[int] = set()
        self.suspected: set[int] = set()
        self.fenced: set[int] = set()
        self.sent: dict[int, int] = {}
        self.recorded = 0
        self.ended: ev.JobEnded | ev.RestartAll | None = None
        self._reported_ready: dict[int, bool] = {}
        self._reported_finished: dict[int, bool] = {}
        first = self._start()
        if self.controller.context is None:
            raise Violation("a plan without a context")
        job = JobFacts(
            shape=self.controller.context.shape,
            micro_batches=scene.micro_batches,
            start_step=first.tables[0].first_step,
            steps=scene.steps,
        )
        super().__init__(job, first, protocol)
        self.evened = True  # the world without controller checks what is done again
        for index in sorted(self.workers):
            self._report(index)

    def _start(self) -> Plan:
        """All agents attach, all workers get ready: the first plan."""
        events: list[ev.Event] = []
        for number in range(self.scene.config.nnodes):
            node = NodeId(f"n{number}")
            events.append(ev.AgentAttached(node=node, workers=self.scene.config.nproc_per_node))
        plans: list[Plan] = []
        while events:
            for effect in self.controller.handle(events.pop(0), self.now):
                match effect:
                    case ev.StartWorker():
                        self.node_of[effect.worker] = effect.node
                        events.append(self._ready_event(effect.worker))
                    case ev.PersistPlan():
                        plans.append(effect.plan)
                    case ev.SendPlans():
                        self.sent[effect.worker] = 1
                    case _:
                        raise Violation(f"at the start: {effect}")
        if len(plans) != 1:
            raise Violation(f"{len(plans)} first plans")
        check_plan(plans[0], self.scene.layers)
        return plans[0]

    def get_ready(self, worker: int) -> None:
        """A process that was started later has called train()."""
        self.waiting.discard(worker)
        self._tell(worker, self._ready_event(worker))

    def _ready_event(self, worker: int) -> ev.WorkerReady:
        address = f"unix:/{worker}"
        return ev.WorkerReady(worker=WorkerId(worker), address=address, job=self.scene.job(), fingerprint="")

    # ------------------------------------------------------------------ the controller

    def handle(self, event: ev.Event) -> None:
        """The controller takes an event; its effects happen."""
        self.now += _MOMENT_S
        effects = self.controller.handle(event, self.now)
        for place, effect in enumerate(effects):
            if self.ended is not None:
                raise Violation(f"{effect} after {self.ended}")
            self._take(effect, last=place == len(effects) - 1)

    def _take(self, effect: ev.Effect, *, last: bool) -> None:
        match effect:
            case ev.StartWorker():
                self.node_of[effect.worker] = effect.node
                self.waiting.add(effect.worker)
            case ev.PersistPlan():
                self._persist(effect)
            case ev.SendPlans():
                if effect.first_epoch > self.sent.get(effect.worker, effect.first_epoch - 1) + 1:
                    raise Violation(f"{effect}, but it has plans up to {self.sent.get(effect.worker)}")
                if effect.first_epoch > len(self.plans):
                    raise Violation(f"{effect} before it is persisted")
                self.sent[effect.worker] = len(self.plans)
            case ev.FenceWorker():
                self.fenced.add(effect.worker)
            case ev.StepRecorded():
                if effect.result.step != self.recorded:
                    raise Violation(f"step {effect.result.step} is recorded after {self.recorded} steps")
                self.recorded += 1
            case ev.JobEnded() | ev.RestartAll():
                self.ended = effect
                if not last:
                    raise Violation(f"effects after {effect}")
            case _:
                pass

    def _persist(self, effect: ev.PersistPlan) -> None:
        if effect.previous is not self.plan:
            raise Violation(f"plan {effect.plan.epoch} does not supersede the newest, {self.plan.epoch}")
        check_plan(effect.plan, self.scene.layers)
        for worker in effect.plan.ids:
            state = self.controller.workers[worker].state
            if state is not WorkerState.MEMBER:
                raise Violation(f"plan {effect.plan.epoch} counts on worker {worker}, which is {state.value}")
        self.push(effect.plan)

    # ------------------------------------------------------------------ workers

    def next_plan(self, index: int) -> Plan | None:
        """Only what the controller has sent to this worker."""
        found = super().next_plan(index)
        return found if found is not None and found.epoch <= self.sent.get(index, 0) else None

    def acts(self, index: int) -> bool:
        """The process runs and is not stopped."""
        return self.up(index) and index not in self.stopped

    def work(self, action: Action) -> None:
        """One action of one worker, and what it tells about it as the runtime does."""
        index = action.args[1] if action.name == "deliver" else action.args[0]
        shell = self.workers.get(index)
        step = shell.protocol.step if shell is not None else self.job.start_step
        copies = len(shell.protocol.copies) if shell is not None else -1
        fact = self.net[(action.args[0], index)][0].fact if action.name == "deliver" else None
        self._act(action)
        if index not in self.workers:
            return
        protocol = self.workers[index].protocol
        plan = protocol.plan
        wanted = action.name == "adopt" or isinstance(fact, State) or len(protocol.copies) != copies
        if isinstance(fact, Parameters) and not self._reported_ready.get(index, False):
            wanted = wanted or protocol.hosted_ready()
        if protocol.step != step:
            self._tell(index, _step_report(protocol))
            follows = any(index in group.joining or index in group.catch_up for group in plan.groups)
            wanted = wanted or protocol.step >= self.job.steps or bool(plan.queries) or follows
        if wanted or (protocol.finished() and not self._reported_finished.get(index, False)):
            self._report(index)
        if self.workers[index].left:
            self._tell(index, self._exit_event(index, signal=0))

    def _act(self, action: Action) -> None:
        args = action.args
        match action.name:
            case "deliver":
                self.deliver(args[0], args[1])
            case "hop":
                self.run_hop(args[0], args[1])
            case "adopt":
                self.adopt(args[0])
            case "resync":
                self.resync(args[0], args[1])
            case _:
                raise Violation(f"nobody can {action}")

    def _report(self, index: int) -> None:
        report = self.workers[index].protocol.report()
        self._reported_ready[index] = report.hosted_ready
        self._reported_finished[index] = report.finished
        self._tell(index, report)

    def _tell(self, index: int, event: ev.Event) -> None:
        self.told.setdefault(index, []).append(event)

    def _exit_event(self, index: int, signal: int) -> ev.WorkerExited:
        return ev.WorkerExited(
            worker=WorkerId(index), exit_code=0, signal=signal, noticed_at=self.now, last_alive_at=self.now
        )

    # ------------------------------------------------------------------ agents and harm

    def kill(self, index: int) -> None:
        """A process dies; its agent tells after what it had told before."""
        self.crash(index)
        self._forget(index)
        self._tell(index, self._exit_event(index, signal=9))

    def _forget(self, index: int) -> None:
        self.waiting.discard(index)
        self.stopped.discard(index)
        self.suspected.discard(index)
        self.fenced.discard(index)

    def suspect(self, index: int, *, stopped: bool) -> None:
        """The agent sees no progress; the process is stopped, or only slow."""
        self.suspected.add(index)
        if stopped:
            self.stopped.add(index)
        cause = "stopped" if stopped else "no-progress"
        self._tell(
            index,
            ev.WorkerSuspected(
                worker=WorkerId(index), cause=cause, evidence="", noticed_at=self.now, last_alive_at=self.now
            ),
        )

    def clear(self, index: int) -> None:
        """It goes on."""
        self.suspected.discard(index)
        self.stopped.discard(index)
        self._tell(index, ev.WorkerCleared(worker=WorkerId(index), evidence=""))

    def lose_node(self, node: NodeId) -> None:
        """The machine is gone with all its workers, and with what its agent had not told yet."""
        for index in [index for index, where in self.node_of.items() if where == node]:
            if index not in self.down:
                self.crash(index)
            self._forget(index)
            self.told.pop(index, None)
        self.lost_nodes.append(node)

    def tick(self) -> None:
        """Time passes until the controller wants to be asked."""
        deadline = self.controller.next_deadline()
        if deadline is None:
            raise Violation("nothing is due")
        self.now = max(self.now, deadline)
        self.handle(ev.Tick())


def _step_report(protocol: StepProtocol) -> ev.StepReported:
    step = max(protocol.decisions)
    result = ev.StepResult(step=step, loss=0.0, tokens=0, samples=0, grad_norm=0.0, skipped=False)
    return ev.StepReported(worker=protocol.me, result=result, received_at=0.0)


def check_plan(plan: Plan, layers: int) -> None:
    """What holds for every plan. Raises Violation."""
    problems: list[str] = []
    if set(plan.hosting) != plan.ids or len(plan.ids) != len(plan.members):
        problems.append(f"hosts {sorted(plan.hosting)} of members {sorted(plan.ids)}")
    for table in plan.tables:
        for route in table.routes:
            if uncovered_layers(route, layers):
                problems.append(f"route {route} leaves out layers")
            for hop in route:
                if not set(range(hop.first, hop.last)) <= set(plan.hosting.get(hop.worker, ())):
                    problems.append(f"{hop} is not on a host of its layers")
                if hop.epoch > plan.epoch:
                    problems.append(f"{hop} was assigned by a later plan")
    for layer, reduce_plan in plan.reduce_plans.items():
        if reduce_plan.order and sorted(reduce_plan.order) != list(plan.hosts_of_layer.get(layer, ())):
            problems.append(f"layer {layer} is reduced over {reduce_plan.order}")
        if reduce_plan.epoch > plan.epoch:
            problems.append(f"the reduce plan of layer {layer} was made by a later plan")
    firsts = [table.first_step for table in plan.tables]
    if firsts != sorted(set(firsts)):
        problems.append(f"tables from steps {firsts}")
    for shard, group in enumerate(plan.groups):
        if not set(group.everyone) <= plan.ids or len(set(group.everyone)) != len(group.everyone):
            problems.append(f"copies of shard {shard} on {group.everyone}")
        if (group.owner is None) != (shard in plan.queries):
            problems.append(f"shard {shard} has owner {group.owner}, asked for: {dict(plan.queries)}")
        if group.joining and shard not in plan.gates:
            problems.append(f"shard {shard} has joining copies and no gate")
    if max([Epoch(0), *plan.gates.values(), *plan.queries.values()]) > plan.epoch:
        problems.append("gates or queries of later plans")
    if problems:
        raise Violation(f"plan {plan.epoch} ({plan.reason}): {problems[0]}")
