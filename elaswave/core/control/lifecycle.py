"""Agents and workers: start, readiness, loss, suspicion, return."""

from elaswave.core.control.advance import AdvanceControl
from elaswave.core.events import (
    AgentAttached,
    AgentLost,
    FenceWorker,
    LinkBroken,
    ShowLine,
    StartWorker,
    WorkerCleared,
    WorkerExited,
    WorkerFailed,
    WorkerReady,
    WorkerSuspected,
)
from elaswave.core.ids import NodeId, WorkerId
from elaswave.core.layout import Layout, partition_layers
from elaswave.core.membership import Trigger, WorkerRecord, WorkerState
from elaswave.core.parameters import block_layout
from elaswave.core.planner.context import PlanningContext
from elaswave.core.planner.initial import initial_plan, make_shape
from elaswave.core.planner.loss import plan_loss
from elaswave.errors import ConfigError

START_NOTICE_S = 10.0
"""Seconds after the first agent came in which nobody wonders yet what a start waits for."""

LINK_GRACE_S = 1.0
"""Seconds in which the death of a peer, if that is the cause, is told by its agent."""


class LifecycleControl(AdvanceControl):
    """Who is there."""

    # ------------------------------------------------------------------ start

    def agent_attached(self, event: AgentAttached) -> None:
        """Start the first workers once all agents are there; agents that come later bring spares."""
        if event.node in self.nodes:
            return
        started = bool(self.workers)
        self.nodes[event.node] = event.workers
        if self.start_limit is None and not started:
            self.start_limit = self.now + self.config.start_limit_s
            self.start_notice = self.now + START_NOTICE_S
        if started:
            self._start_node(event.node)
        elif len(self.nodes) == self.config.nnodes:
            for node in sorted(self.nodes):
                self._start_node(node)

    def _start_node(self, node: NodeId) -> None:
        for local_index in range(self.nodes[node]):
            self._start(node, local_index, incarnation=0)

    def _start(self, node: NodeId, local_index: int, incarnation: int) -> None:
        worker = WorkerId(self.next_worker)
        self.next_worker += 1
        self.workers[worker] = WorkerRecord(worker=worker, node=node, local_index=local_index, incarnation=incarnation)
        rank = self._rank(node, local_index)
        self.effects.append(
            StartWorker(
                node=node,
                worker=worker,
                local_index=local_index,
                incarnation=incarnation,
                rank=rank,
                world_size=sum(self.nodes.values()),
                restart_count=self.restarts,
            )
        )

    def _rank(self, node: NodeId, local_index: int) -> int:
        before = [other for other in sorted(self.nodes) if other < node]
        return sum(self.nodes[other] for other in before) + local_index

    def worker_ready(self, event: WorkerReady) -> None:
        """Check that the worker runs the same job; begin when all are ready, else keep it warm."""
        record = self.worker(event.worker)
        record.address = event.address
        record.move(Trigger.READY)
        if record.state is not WorkerState.WARM:
            return
        if self.job is None:
            self.job, self.fingerprint = event.job, event.fingerprint
        difference = self._difference(record, event)
        if self.plan is None:
            if difference:
                raise ConfigError(difference)
            self._begin_when_ready()
        elif difference:
            record.move(Trigger.FENCED)
            self.effects.append(FenceWorker(worker=record.worker, reason=difference))
            self.effects.append(ShowLine(text=f"not admitted: {difference}"))
        else:
            self.advance()

    def _difference(self, record: WorkerRecord, event: WorkerReady) -> str:
        """Why this worker cannot take part in the job; empty where it can."""
        if self.job is not None and event.job.digest != self.job.digest:
            return (
                f"{record.name} runs another job (digest {event.job.digest[:12]}, others {self.job.digest[:12]}): "
                "script, arguments and data must be the same on all workers"
            )
        if event.fingerprint != self.fingerprint:
            return (
                f"{record.name} computes other bits (fingerprint {event.fingerprint[:12]}, others "
                f"{self.fingerprint[:12]}): hardware, libraries and thread counts must be the same on all workers"
            )
        return ""

    def _begin_when_ready(self) -> None:
        alive = self.alive()
        if self.job is None or any(record.state is not WorkerState.WARM for record in alive):
            return
        layout = Layout(dp=self.config.dp, pp=self.config.pp, tp=self.config.tp)
        chosen = sorted(alive, key=lambda record: record.worker)[: layout.workers]
        # A single worker has nobody to hold replicas; any other impossible number is refused by the placement.
        replicas = self.config.replicas if layout.workers > 1 else 0
        blocks = block_layout(self.job.layers).blocks
        shape = make_shape(len(self.job.layers), blocks, layout, self.config.shard_elements)
        plan = initial_plan(
            shape=shape,
            layout=layout,
            members=[record.member() for record in chosen],
            micro_batches=self.job.micro_batches,
            replicas=replicas,
            step=self.job.start_step,
        )
        self.context = PlanningContext(
            shape=shape,
            stages=partition_layers(shape.layers, layout.pp),
            replicas=self.config.replicas,
            micro_batches=self.job.micro_batches,
            reduce=self.config.reduce,
        )
        self.next_step = self.job.start_step
        self.start_limit = self.start_notice = None
        self.last_step_at = self.now
        for record in chosen:
            record.move(Trigger.ADMITTED)
        self.persist(plan)

    # ------------------------------------------------------------------ loss

    def worker_exited(self, event: WorkerExited) -> None:
        """A process is gone: exclude it, start another one where that is allowed."""
        record = self.worker(event.worker)
        was = record.state
        record.move(Trigger.EXITED)
        record.fence_at = None
        record.progress = event.progress
        if was is WorkerState.GONE:
            return
        how = f"signal {event.signal}" if event.signal else f"exit code {event.exit_code}"
        if self.plan is None:
            self.end(1, f"{record.name} ended with {how} before the first step")
            return
        if self.plan.finished:
            self._end_when_all_left()
            return
        cause = "killed" if event.signal else "exited"
        self._exclude((record,), cause, f"pidfd: {how}", event.noticed_at, event.last_alive_at)
        if not self.ended:
            self._restart(record)
        self.advance()

    def _end_when_all_left(self) -> None:
        if self.plan is not None and all(
            self.workers[worker].state is WorkerState.GONE for worker in self.plan.ids if worker in self.workers
        ):
            self.end(0, "")

    def agent_lost(self, event: AgentLost) -> None:
        """A node is gone with all its workers, at once."""
        records = [record for record in self.alive() if record.node == event.node]
        self.nodes.pop(event.node, None)
        for record in records:
            record.move(Trigger.EXITED)
            record.fence_at = None
        if self.plan is None:
            if not self.ended:
                self.end(1, f"node {event.node} was lost before the first step: {event.evidence}")
        elif self.plan.finished:
            self._end_when_all_left()
        else:
            self._exclude(tuple(records), "node lost", event.evidence, event.noticed_at, 0.0)
            self.advance()

    def _exclude(
        self, records: tuple[WorkerRecord, ...], cause: str, evidence: str, noticed_at: float, last_alive_at: float
    ) -> None:
        context, plan = self.need_plan()
        lost = frozenset(record.worker for record in records) & plan.ids
        for record in records:
            self.joining.discard(record.worker)
            self.reports.pop(record.worker, None)
        if not lost:
            return
        if lost == plan.ids and self.nodes:
            self.go_back(f"all {len(lost)} workers are lost")
            return
        slowest = self.slowest_step()
        for worker in lost:
            self.steps_of.pop(worker, None)
        names = ", ".join(record.name for record in records if record.worker in lost)
        new = plan_loss(context, plan, lost, slowest, f"{names} {cause} ({evidence}): work goes to the hosts left")
        self.swaps = frozenset(swap for swap in self.swaps if swap[1] not in lost)
        self.uneven = True
        self.persist(new)
        ids = tuple(sorted(lost))
        self.open_incident(cause, evidence, ids, noticed_at=noticed_at, last_alive_at=last_alive_at, plan=new)

    def _restart(self, record: WorkerRecord) -> None:
        if self.restarts < self.config.max_restarts and record.node in self.nodes:
            self.restarts += 1
            self._start(record.node, record.local_index, record.incarnation + 1)

    # ------------------------------------------------------------------ suspicion

    def worker_suspected(self, event: WorkerSuspected) -> None:
        """Re-route now, fence later; both only if somebody else is there to go on, the latter as soon as there is."""
        record = self.worker(event.worker)
        was = record.state
        if self.plan is not None and was is WorkerState.MEMBER and len(self.plan.ids) == 1:
            self.effects.append(ShowLine(text=f"{record.name} {event.cause}: waiting, nobody else is left"))
            record.fence_at = self.now + self.config.suspect_grace_s
            return
        record.move(Trigger.SUSPECTED)
        record.progress = event.progress
        if record.state is not WorkerState.SUSPECTED or was is WorkerState.SUSPECTED:
            return
        record.fence_at = self.now + self.config.suspect_grace_s
        if self.plan is not None and was is WorkerState.MEMBER and not self.plan.finished:
            self._exclude((record,), event.cause, event.evidence, event.noticed_at, event.last_alive_at)
            self.advance()

    def worker_cleared(self, event: WorkerCleared) -> None:
        """It goes on: let it in again, as a joiner (rule 5.6)."""
        record = self.worker(event.worker)
        record.move(Trigger.CLEARED)
        record.fence_at = None
        if self.plan is None:
            self._begin_when_ready()
        elif record.state is WorkerState.WARM:
            self.advance()

    def check_deadlines(self) -> None:
        """Fence suspects whose grace is over; give up on starts and ends that take too long."""
        for record in self.workers.values():
            if record.fence_at is not None and record.fence_at <= self.now:
                if self.plan is not None and self.plan.ids == {record.worker}:
                    record.fence_at = self.now + self.config.suspect_grace_s  # others may come
                    continue
                record.fence_at = None
                record.move(Trigger.FENCED)
                reason = f"no sign of life for {self.config.suspect_grace_s:g} s after suspicion"
                self.effects.append(FenceWorker(worker=record.worker, reason=reason))
        for peer, (due, text) in list(self.broken_links.items()):
            if due <= self.now:
                del self.broken_links[peer]
                if self.workers[peer].state is WorkerState.MEMBER and not (self.plan and self.plan.finished):
                    self.effects.append(ShowLine(text=text))
        if self.start_notice is not None and self.start_notice <= self.now:
            self.start_notice = None
            limit = f"waiting up to {self.config.start_limit_s:g} s"
            self.effects.append(ShowLine(text=f"{limit} for {self._start_lacks()}"))
        if self.start_limit is not None and self.start_limit <= self.now:
            self.end(1, f"not ready within {self.config.start_limit_s:g} s: {self._start_lacks()}")
        if self.end_limit is not None and self.end_limit <= self.now:
            self.end(0, "")

    def _start_lacks(self) -> str:
        """Whom the start of the job waits for."""
        missing = self.config.nnodes - len(self.nodes)
        if missing > 0:
            here = ", ".join(sorted(self.nodes)) or "none"
            return f"{missing} of {self.config.nnodes} nodes (here: {here})"
        return ", ".join(record.name for record in self.alive() if record.state is WorkerState.STARTING)

    def worker_failed(self, event: WorkerFailed) -> None:
        """The user's code, or ours, raised: the job cannot go on."""
        record = self.worker(event.worker)
        refused = event.kind == "config" and not self.step_seconds
        if refused:
            self.end(93, event.message)
            return
        text = f"{record.name}: {event.message}"
        self.end(1, f"{text}\n{event.traceback}" if event.traceback else text)

    def link_broken(self, event: LinkBroken) -> None:
        """Evidence only: the peer's agent knows whether it lives."""
        peer: WorkerRecord | None = self.workers.get(WorkerId(event.peer))
        if peer is not None and peer.state is WorkerState.MEMBER:
            text = f"worker {event.worker} lost its link to {peer.name}, which lives: {event.reason}"
            self.broken_links.setdefault(peer.worker, (self.now + LINK_GRACE_S, text))
