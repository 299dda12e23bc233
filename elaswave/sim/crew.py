"""A crew: workers with the project's own protocol, links between them, and the plans that they are sent.

Links are FIFO per pair and unordered between pairs. A worker adopts plans one by one at any time. Every violation of a
promise raises Violation.
"""

from dataclasses import replace

from elaswave.core.facts import Decision
from elaswave.core.ids import Epoch, MicroBatch, Step, WorkerId
from elaswave.core.plan import Hop, Plan
from elaswave.core.protocol.state import JobFacts
from elaswave.core.protocol.worker import StepProtocol
from elaswave.sim.shell import Message, Violation, WorkerShell


class Crew:
    """All workers, all links, all persisted plans. `workers` holds those that have begun; spares begin by plan."""

    def __init__(
        self, job: JobFacts, plan: Plan, protocol: type[StepProtocol] = StepProtocol, log_cap: int | None = None
    ) -> None:
        """`plan`: the first one; its members begin at once."""
        self.job = job
        self.kind = protocol
        self.log_cap = log_cap
        self.plans = [plan]
        self.net: dict[tuple[int, int], tuple[Message, ...]] = {}
        self.down: frozenset[int] = frozenset()
        self.early: dict[int, tuple[tuple[int, Message], ...]] = {}
        self.ever_excluded: frozenset[int] = frozenset()
        self.evened = False
        """Planned routes have been made: by them, work of workers that are alive may be done again."""
        self.run_hops: frozenset[tuple[int, Hop, int]] = frozenset()
        self.redone = 0
        self.decisions: dict[Step, Decision] = {}
        self.version = 0
        """Changes with everything but the state of workers and links."""
        self.workers: dict[int, WorkerShell] = {}
        self._own: set[int] = set()
        self._marks: dict[int, int] = {}
        self._ready: dict[int, list[tuple[MicroBatch, Hop, bool]]] = {}
        for index in sorted(plan.ids):
            shell = WorkerShell(protocol(index, job, plan))
            shell.protocol.start_fresh()
            shell.states = {shard: () for shard in shell.protocol.copies}
            shell.parameters = {shard: () for shard in shell.protocol.parameters}
            self.workers[index] = shell
        for index in sorted(plan.ids):
            self._perform(index)

    # ------------------------------------------------------------------ views

    @property
    def plan(self) -> Plan:
        """The newest persisted plan."""
        return self.plans[-1]

    def members(self) -> list[int]:
        """Workers that the newest plan counts on."""
        return sorted(self.plan.ids)

    def up(self, index: int) -> bool:
        """The process runs: it has not crashed and has not left."""
        shell = self.workers.get(index)
        return index not in self.down and not (shell is not None and shell.left)

    def next_plan(self, index: int) -> Plan | None:
        """The plan that the worker adopts next: for a spare the first one that counts on it."""
        shell = self.workers.get(index)
        if shell is not None:
            epoch = shell.protocol.plan.epoch  # epochs start at 1, so the plan after it has this index
            return self.plans[epoch] if epoch < len(self.plans) else None
        return next((plan for plan in self.plans if index in plan.ids), None)

    def ready_hops(self, index: int) -> list[tuple[MicroBatch, Hop, bool]]:
        """Hops that this worker could run now."""
        found = self._ready.get(index)
        if found is None:
            found = self._ready[index] = self.workers[index].ready_hops()
        return found

    def push(self, plan: Plan) -> None:
        """Persist the next plan."""
        if plan.epoch != len(self.plans) + 1:
            raise Violation(f"plan {plan.epoch} after {self.plan.epoch}")
        self.version += 1
        self.plans.append(plan)

    # ------------------------------------------------------------------ changes of one worker

    def changed(self, index: int) -> None:
        """Called for every change of a worker."""

    def touch(self, index: int) -> WorkerShell:
        """The worker, to be changed: clones share workers until then."""
        shell = self.workers[index]
        if index not in self._own:
            shell = self.workers[index] = shell.clone()
            self._own.add(index)
        self._marks.pop(index, None)
        self._ready.pop(index, None)
        self.changed(index)
        return shell

    def _perform(self, index: int) -> None:
        """Do what the worker's protocol asks for until it asks for nothing."""
        shell = self.touch(index)
        while effects := shell.protocol.take_effects():
            for effect in effects:
                message = shell.perform(effect)
                if message is not None:
                    self._send(index, int(effect.to), message)  # type: ignore[union-attr]
        if self.log_cap is not None:
            shell.trim_log(self.log_cap)
        self._check_decisions(shell)

    def _check_decisions(self, shell: WorkerShell) -> None:
        for step, decision in shell.protocol.decisions.items():
            if self.decisions.setdefault(step, decision) != decision:
                raise Violation(f"step {step} is decided as {decision} and as {self.decisions[step]}")

    def _send(self, source: int, target: int, message: Message) -> None:
        if target == source:
            self.workers[source].protocol.receive(WorkerId(source), message.fact, message.payload)
        elif self.up(target) and self.up(source) and target not in self.workers[source].unnoticed:
            link = (source, target)
            self.net[link] = (*self.net.get(link, ()), message)

    def deliver(self, source: int, target: int) -> None:
        """The oldest message of a link arrives; a spare keeps it until it begins."""
        queue = self.net.pop((source, target))
        if len(queue) > 1:
            self.net[(source, target)] = queue[1:]
        if not self.up(target):
            return
        if target not in self.workers:
            self.early[target] = (*self.early.get(target, ()), (source, queue[0]))
            return
        shell = self.touch(target)
        shell.unnoticed -= {source}  # it came by a new connection
        shell.protocol.receive(WorkerId(source), queue[0].fact, queue[0].payload)
        self._perform(target)

    def run_hop(self, index: int, place: int) -> None:
        """Run one of the hops that are ready."""
        micro_batch, hop, backward = self.ready_hops(index)[place]
        shell = self.touch(index)
        if backward:
            self._note_work(index, shell.protocol.step, micro_batch, hop)
        shell.run_hop(micro_batch, hop, backward=backward)
        self._perform(index)

    def replay(self, index: int) -> None:
        """Make a value again that the capped log had to drop."""
        shell = self.touch(index)
        shell.replay(*shell.ready_replays()[0])
        self._perform(index)

    def _note_work(self, index: int, step: int, micro_batch: MicroBatch, hop: Hop) -> None:
        plain = replace(hop, epoch=Epoch(0), worker=WorkerId(0))
        for other_step, other, other_batch in self.run_hops:
            same = replace(other, epoch=Epoch(0), worker=WorkerId(0)) == plain
            if (other_step, other_batch) == (step, micro_batch) and same:
                self.redone += 1
                untouched = not {int(other.worker), index} & self.ever_excluded
                if other.worker != index and untouched and not self.evened:
                    raise Violation(f"work of live worker {other.worker} redone by {index}: {step}, {micro_batch}")
        self.run_hops |= {(step, hop, int(micro_batch))}

    def adopt(self, index: int) -> None:
        """The worker takes over the next plan."""
        plan = self.next_plan(index)
        if plan is None:
            raise Violation(f"w{index} has no plan to adopt")
        if index not in self.workers:
            self._begin(index, plan)
        else:
            self._follow(index, plan)
        if plan.finished:
            self.version += 1
            self.touch(index).left = True
            self.net = {link: queue for link, queue in self.net.items() if link[1] != index}

    def _follow(self, index: int, plan: Plan) -> None:
        before = self.ready_hops(index)
        shell = self.touch(index)
        step = shell.protocol.step
        shell.protocol.adopt(plan)
        kept = {(m, hop) for m, hop in shell.protocol.my_hops()} if step < self.job.steps else set()
        after = shell.ready_hops()
        for found in before:
            if shell.protocol.step == step and found[:2] in kept and found not in after:
                raise Violation(f"plan {plan.epoch} stopped work of w{index} that it does not touch: {found}")
        self._perform(index)

    def _begin(self, index: int, plan: Plan) -> None:
        """A spare starts with the first plan that counts on it; what came before is taken in then."""
        self.workers[index] = WorkerShell(self.kind(WorkerId(index), self.job, plan))
        self._own.add(index)
        self.workers[index].protocol.start_joining()
        self._perform(index)
        for source, message in self.early.pop(index, ()):
            self.touch(index).protocol.receive(WorkerId(source), message.fact, message.payload)
            self._perform(index)

    def crash(self, index: int) -> None:
        """The worker dies. What was under way to it is lost; of what it had sent, a part may still arrive."""
        self.version += 1
        self.down |= {index}
        self.ever_excluded |= {index}
        self.early.pop(index, None)
        self.net = {link: queue for link, queue in self.net.items() if link[1] != index}

    def lose(self, source: int, target: int) -> None:
        """The rest of what a dead worker had sent never arrives."""
        del self.net[(source, target)]

    # ------------------------------------------------------------------ links

    def cut(self, one: int, other: int) -> None:
        """The link between two live workers breaks: all that is in flight is lost, until each has noticed."""
        for source, target in ((one, other), (other, one)):
            self.net.pop((source, target), None)
            if source in self.workers:
                shell = self.touch(source)
                shell.broken |= {target}
                shell.unnoticed |= {target}

    def resync(self, index: int, peer: int) -> None:
        """A worker has noticed the broken link and sends its peer what it may have lost, if the plan counts on it."""
        shell = self.touch(index)
        shell.broken -= {peer}
        shell.unnoticed -= {peer}
        if peer in shell.protocol.plan.ids:
            shell.protocol.resync(WorkerId(peer))
        self._perform(index)
