"""The main loop of a worker that is in the plan: messages, plans, turns of the executor, what follows a decision."""

import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elaswave.comm.inbox import ConnectionRefused, Inbox, LinkItem, LinksFailed, PeerClosed, Received
from elaswave.comm.links import Links
from elaswave.core.events import FinalDigest, LinkBroken, StepReported, StopRequested, UserLine
from elaswave.core.facts import Decision
from elaswave.core.ids import BlockId, Layer, MicroBatch, Step, WorkerId
from elaswave.core.injection import Injection
from elaswave.core.plan import Plan
from elaswave.core.protocol.state import EdgeKey, JobFacts
from elaswave.core.protocol.worker import StepProtocol
from elaswave.core.settings import WorkerSettings
from elaswave.core.shape import ModelShape
from elaswave.errors import JobError
from elaswave.job import Job
from elaswave.runtime.accumulation import accumulation_of
from elaswave.runtime.agent_link import AgentLink
from elaswave.runtime.callbacks import Callbacks
from elaswave.runtime.codec import FrameKind, Reader, Writer, bytes_of_tensor, decode_fact, describe_tensor, tensor_of
from elaswave.runtime.data import MicroBatchLoader
from elaswave.runtime.device import Device
from elaswave.runtime.digest import parameters_digest
from elaswave.runtime.evaluation import evaluate
from elaswave.runtime.executor import Executor
from elaswave.runtime.faults import FaultInjector
from elaswave.runtime.gather import BlockGather
from elaswave.runtime.hops import HopRunner
from elaswave.runtime.host_memory import LinkMemory
from elaswave.runtime.model import HostedModel
from elaswave.runtime.optimizer import Update
from elaswave.runtime.reference import result_of
from elaswave.runtime.saving import CheckpointSaver
from elaswave.runtime.shell import ProtocolShell, ShellParts
from elaswave.runtime.start import Start, shards_of_plan

WAIT_S = 0.5  # how often a waiting worker shows that it is alive
RESYNC_AFTER_S = 0.1  # a peer that died is out of the plan by then, as a rule
CALLBACK_LIMIT_S = 3600.0  # the user's own code; a hang in it is the user's to bound

Item = LinkItem | Plan | Injection | StopRequested | WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """What connects a worker with the rest of the job; owned by the session."""

    agent: AgentLink
    links: Links
    inbox: Inbox[Item]
    faults: FaultInjector
    settings: WorkerSettings

    def handle(self, item: Item) -> None:
        """What concerns a worker whether it is in the plan or not. Raises JobError for an order to stop."""
        match item:
            case Injection():
                self.faults.add(item)
            case StopRequested():
                raise JobError(f"stopped by the agent: {item.reason}")
            case ConnectionRefused():
                text = f"worker {self.settings.worker} refused a connection: {item.error}"
                self.agent.send(UserLine(worker=self.settings.worker, text=text))
            case LinksFailed():
                raise item.error
            case _:
                pass


class TrainingLoop:
    """One compute thread that drives protocol, shell and executor of one worker."""

    def __init__(self, job: Job, start: Start, plan: Plan, connections: Connections, device: Device) -> None:
        me = connections.settings.worker
        self._job = job
        self._me = me
        self._layout = start.layout
        self._connections = connections
        self._device = device
        self._left = False
        self._resync: dict[WorkerId, float] = {}
        self._peers: set[WorkerId] = set(plan.ids) - {me}
        self._report_wanted = True
        self._reported_ready = self._reported_finished = self._digest_sent = False
        self._evaluate_due: Step | None = None
        shards = shards_of_plan(start.layout, plan, connections.settings.shard_elements)
        shape = ModelShape(len(job.layers), start.layout.blocks, shards)
        facts = JobFacts(
            shape=shape,
            micro_batches=job.micro_batches,
            start_step=start.description.start_step,
            steps=job.steps,
        )
        self._protocol = StepProtocol(me, facts, plan)
        self._model = HostedModel(job, start.layout, device)
        self._build(shape, start)

    def _build(self, shape: ModelShape, start: Start) -> None:
        runner = HopRunner(self._job, self._model, MicroBatchLoader(self._job), self._device)
        connections, settings = self._connections, self._connections.settings
        memory = LinkMemory(connections.links)
        parts = ShellParts(
            job=self._job,
            shape=shape,
            protocol=self._protocol,
            model=self._model,
            runner=runner,
            accumulation=accumulation_of(self._job, memory),
            links=connections.links,
            memory=memory,
        )
        self._shell = ProtocolShell(parts, {}, self._on_phase, self._on_decided)
        self._executor = Executor(
            self._shell,
            runner,
            self._device,
            progress=connections.agent.progress,
            faults=connections.faults,
            report_work=connections.agent.send,
            grant=self._grant if settings.unbuffered else None,
            log_cap_bytes=settings.log_cap_bytes,
        )
        self._gather = BlockGather(self._protocol, self._model, self._ask_block, self._send_block)
        self._callbacks = Callbacks(self._job, self._me, self._send_snapshot, self._show)
        self._saver = CheckpointSaver(settings, start.layout, start.description.digest, connections.agent.progress)

    def begin(self, start: Start, early: Sequence[Received], *, fresh: bool) -> None:
        """Take up parameters and states (`fresh`: at the first plan of the job), then what came early."""
        self._connections.links.set_addresses(_addresses(self._protocol.plan, self._me))
        self._shell.perform()
        if fresh:
            self._protocol.start_fresh()
            self._callbacks.resume(self._protocol.job.start_step, start.user_state())
            copies = tuple(self._protocol.copies)
            self._shell.states.update(start.load(self._protocol.job.shape, copies, self._model))
        else:
            self._protocol.start_joining()
        self._executor.follow()
        self._shell.perform()
        self._callbacks.plan_changed(self._protocol.plan)
        for frame in early:
            self._handle_frame(frame)

    def run(self) -> None:
        """Until the plan says that the job has finished."""
        inbox = self._connections.inbox
        while not self._left:
            if self._executor.is_repairing:
                inbox.poll()  # inputs of repair are sent again while this worker computes
            items = inbox.take_all()
            for item in items:
                self._handle(item)
            if items:
                self._executor.follow()
            self._after_decision()
            if self._report_wanted:
                self._send_report()
            if self._left or (self._evaluate_due is None and self._executor.turn()):
                continue
            self._finish_up()
            self._gather.answer()
            if not self._report_wanted:
                self._connections.agent.progress.alive()
                self._resync_due()
                inbox.wait(time.monotonic() + WAIT_S)

    # ------------------------------------------------------------------ messages

    def _handle(self, item: Item) -> None:
        if isinstance(item, Received):
            self._handle_frame(item)
        elif isinstance(item, Plan):
            self._adopt(item)
        elif isinstance(item, PeerClosed):
            self._peer_closed(item)
        else:
            self._connections.handle(item)

    def _adopt(self, plan: Plan) -> None:
        self._connections.links.set_addresses(_addresses(plan, self._me))
        self._protocol.adopt(plan)
        self._executor.follow()
        self._shell.perform()
        self._callbacks.plan_changed(plan)
        self._report_wanted = True
        self._left = plan.finished
        if self._left:
            self._forget(self._peers - plan.ids)
        self._peers |= plan.ids - {self._me}

    def _handle_frame(self, frame: Received) -> None:
        reader = Reader(frame.meta)
        if frame.kind <= FrameKind.STATE:
            self._handle_fact(frame, reader)
            return
        match frame.kind:
            case FrameKind.GRANT:
                step, micro_batch, cut, backward = reader.numbers(4)
                self._executor.granted.add(EdgeKey(Step(step), MicroBatch(micro_batch), Layer(cut), bool(backward)))
            case FrameKind.BLOCK_REQUEST:
                version, block = reader.numbers(2)
                self._gather.requested(frame.peer, version, BlockId(block))
            case FrameKind.BLOCK:
                version, block = reader.numbers(2)
                self._gather.received(version, BlockId(block), tensor_of(reader, _as_tensor(frame.payload)))
            case FrameKind.BLOCK_GONE:
                version, block = reader.numbers(2)
                self._gather.gone(version, BlockId(block))
            case FrameKind.SNAPSHOT:
                self._callbacks.snapshot_received(reader.number(), _as_tensor(frame.payload))
            case _:
                self._handle_fact(frame, reader)

    def _handle_fact(self, frame: Received, reader: Reader) -> None:
        fact = decode_fact(frame.kind, reader)
        payload = tensor_of(reader, _as_tensor(frame.payload)) if reader.more else None
        copies = len(self._protocol.copies)
        self._protocol.receive(frame.peer, fact, payload)
        self._shell.perform()
        if frame.kind == FrameKind.STATE or len(self._protocol.copies) != copies:
            self._report_wanted = True
        elif frame.kind == FrameKind.PARAMETERS and not self._reported_ready:
            self._report_wanted = self._protocol.hosted_ready()

    def _send_report(self) -> None:
        self._report_wanted = False
        report = self._protocol.report()
        if self._evaluate_due is not None:
            report = replace(report, finished=False)  # hosts must stay until their blocks are here
        self._reported_ready = report.hosted_ready
        self._reported_finished = report.finished
        self._connections.agent.send(report)

    # ------------------------------------------------------------------ steps

    def _on_phase(self, step: Step, phase: str) -> None:
        self._connections.agent.progress.begin(step, phase)
        self._connections.faults.at(step, phase)

    def _on_decided(self, decision: Decision, update: Update) -> None:
        plan = self._protocol.plan
        result = result_of(self._job, decision, update)
        self._connections.agent.send(StepReported(worker=self._me, result=result, received_at=time.monotonic()))
        version = Step(decision.step + 1)
        self._saver.step_decided(version, self._job.steps)
        every = self._job.evaluate_every
        if every and version % every == 0 and self._me == plan.caller:
            self._evaluate_due = decision.step
            self._gather.want(version)
        self._report_wanted = self._report_wanted or version >= self._job.steps or bool(plan.queries)
        self._report_wanted = self._report_wanted or any(
            self._me in group.joining or self._me in group.catch_up for group in plan.groups
        )
        with self._connections.agent.progress.long_operation(CALLBACK_LIMIT_S):
            self._callbacks.step_decided(result, plan)

    def _after_decision(self) -> None:
        """Evaluate, then save: what an evaluation changes in the user's state belongs to the same step."""
        if self._evaluate_due is not None:
            blocks = self._gather.collect(self._protocol.plan)
            if blocks is not None:
                self._evaluate(self._evaluate_due, blocks)
            elif self._gather.lost or self._me != self._protocol.plan.caller:
                self._gather.want(None)
                self._show(f"the evaluation of step {self._evaluate_due} is left out: others are further on by now")
            else:
                return
            self._evaluate_due = None
        written = self._saver.write(self._me, self._protocol, self._shell, self._callbacks)
        if written is not None:
            self._connections.agent.send(written)

    def _evaluate(self, step: Step, blocks: Mapping[BlockId, Tensor]) -> None:
        whole = HostedModel(self._job, self._layout, self._device)
        whole.host(Layer(layer) for layer in range(len(self._job.layers)))
        for block, values in blocks.items():
            if whole.hosts_block(block):
                whole.block(block).copy_(values)
        with self._connections.agent.progress.long_operation(CALLBACK_LIMIT_S):
            text = evaluate(self._job, whole, self._device, step)
        if text:
            self._show(text)

    def _finish_up(self) -> None:
        """After the last step: say so once everything is here, and take the digest, if one is wanted."""
        if self._protocol.step < self._job.steps:
            return
        if not self._reported_finished and self._evaluate_due is None and self._protocol.finished():
            self._report_wanted = True
        plan = self._protocol.plan
        if not self._connections.settings.want_digest or self._evaluate_due is not None or self._me != min(plan.ids):
            return
        if self._gather.wanted is None and not self._digest_sent:
            self._gather.want(self._job.steps)
        blocks = self._gather.collect(plan) if self._gather.wanted is not None else None
        if blocks is not None:
            self._digest_sent = True
            digest = parameters_digest(self._layout, blocks.__getitem__)
            self._connections.agent.send(FinalDigest(worker=self._me, parameters=digest))

    # ------------------------------------------------------------------ peers

    def _show(self, text: str) -> None:
        self._connections.agent.send(UserLine(worker=self._me, text=text))

    def _grant(self, peer: WorkerId, key: EdgeKey) -> None:
        meta = Writer().numbers(key.step, key.micro_batch, key.cut, key.backward)
        self._connections.links.send(peer, FrameKind.GRANT, meta.finish())

    def _ask_block(self, host: WorkerId, version: int, block: BlockId) -> None:
        meta = Writer().numbers(version, block)
        self._connections.links.send(host, FrameKind.BLOCK_REQUEST, meta.finish())

    def _send_block(self, to: WorkerId, version: int, block: BlockId, data: Tensor | None) -> None:
        meta = Writer().numbers(version, block)
        if data is None:
            self._connections.links.send(to, FrameKind.BLOCK_GONE, meta.finish())
            return
        host_data = self._device.to_host(data)
        describe_tensor(meta, host_data)
        self._connections.links.send(to, FrameKind.BLOCK, meta.finish(), bytes_of_tensor(host_data), copy=True)

    def _send_snapshot(self, keeper: WorkerId, version: int, data: Tensor) -> None:
        meta = Writer().numbers(version)
        self._connections.links.send(keeper, FrameKind.SNAPSHOT, meta.finish(), bytes_of_tensor(data))

    def _peer_closed(self, closed: PeerClosed) -> None:
        """Frames to and from a peer may be lost: if the plan still counts on it, tell it everything again soon."""
        if closed.peer in self._protocol.plan.ids and not self._left and not closed.orderly:
            broken = LinkBroken(worker=self._me, peer=closed.peer, reason=closed.reason)
            self._connections.agent.send(broken)
            self._resync.setdefault(closed.peer, time.monotonic() + RESYNC_AFTER_S)
        elif closed.peer not in self._protocol.plan.ids:
            self._forget({closed.peer})

    def _forget(self, peers: Set[WorkerId]) -> None:
        """Drop what waits for workers that nobody counts on any more; one that lives dials again by itself."""
        for peer in peers:
            self._connections.links.forget(peer)
        self._peers -= peers

    def _resync_due(self) -> None:
        now = time.monotonic()
        for peer in [peer for peer, due in self._resync.items() if due <= now]:
            del self._resync[peer]
            if peer in self._protocol.plan.ids:
                self._executor.ask_again()
                self._gather.ask_again(peer)
                self._protocol.resync(peer)
                self._shell.perform()


def _addresses(plan: Plan, me: WorkerId) -> Mapping[WorkerId, str]:
    return {member.worker: member.address for member in plan.members if member.worker != me}


def _as_tensor(payload: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(payload)
