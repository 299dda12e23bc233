"""One worker of a launched job, from connecting to its agent to leaving by plan."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elaswave.comm.inbox import ConnectionRefused, Inbox, LinkItem, LinksFailed, PeerClosed, Received
from elaswave.comm.links import Links
from elaswave.core.events import FinalDigest, LinkBroken, StepReported, StepResult, StopRequested, UserLine, WorkerReady
from elaswave.core.exact import exact_to_float
from elaswave.core.facts import Decision
from elaswave.core.ids import Layer, Step, WorkerId
from elaswave.core.injection import Injection
from elaswave.core.parameters import block_layout
from elaswave.core.plan import Plan
from elaswave.core.protocol.state import EdgeKey, JobFacts
from elaswave.core.protocol.worker import StepProtocol
from elaswave.core.settings import WorkerSettings
from elaswave.core.shape import ModelShape
from elaswave.errors import DeadlineExceeded, JobError
from elaswave.job import Job
from elaswave.runtime.accumulation import accumulation_of
from elaswave.runtime.agent_link import AgentLink, Delivery
from elaswave.runtime.checkpoint import write_shards
from elaswave.runtime.codec import FrameKind, Reader, Writer, bytes_of_tensor, decode_fact, tensor_of
from elaswave.runtime.data import MicroBatchLoader
from elaswave.runtime.description import describe_job
from elaswave.runtime.device import CpuDevice, Device, configure_numerics
from elaswave.runtime.executor import Executor
from elaswave.runtime.faults import FaultInjector
from elaswave.runtime.gather import FinalGather
from elaswave.runtime.hops import HopRunner
from elaswave.runtime.model import HostedModel
from elaswave.runtime.optimizer import Update, gradient_norm
from elaswave.runtime.shell import ProtocolShell, ShellParts
from elaswave.runtime.start import Start, find_start, shards_of_plan

SETTINGS_LIMIT_S = 60.0
WAIT_S = 0.5  # how often a waiting worker shows that it is alive
PAYLOAD_LIMIT_BYTES = 8 << 30
CLOSE_LIMIT_S = 5.0
SAVE_LIMIT_S = 600.0  # an idle disk needs seconds; a shared file system may stall for minutes
RESYNC_AFTER_S = 0.1

Item = LinkItem | Plan | Injection | StopRequested | WorkerSettings


class Session:
    """The worker's main object: owns agent link, links, protocol and executor; one compute thread."""

    def __init__(self, job: Job, agent_socket: str, worker: WorkerId) -> None:
        self._job = job
        self._me = worker
        self._inbox: Inbox[Item] = Inbox()
        self._agent = AgentLink(agent_socket, worker, self._deliver)
        self._device: Device = CpuDevice()
        self._settings: WorkerSettings | None = None
        self._early: list[Received] = []
        self._left = False
        self._resync: dict[WorkerId, float] = {}
        self._reported_ready = False
        self._reported_finished = False
        self._report_wanted = False
        self._save_due: Step | None = None

    def _deliver(self, item: Delivery) -> None:
        self._inbox.put(item)

    # ------------------------------------------------------------------ life

    def run(self) -> None:
        """Train until the plan says that the job has finished. Raises JobError for failures of the user's code."""
        configure_numerics()
        self._agent.open()
        try:
            settings = self._await_settings()
            self._faults = FaultInjector(self._agent.progress.alive)
            self._links = Links(self._me, settings.token.encode(), self._inbox, payload_limit_bytes=PAYLOAD_LIMIT_BYTES)
            address = self._listen(settings)
            self._links.start()
            try:
                self._train(settings, address)
            finally:
                self._links.close(CLOSE_LIMIT_S)
        finally:
            self._agent.close()

    def _await_settings(self) -> WorkerSettings:
        deadline = time.monotonic() + SETTINGS_LIMIT_S
        while self._inbox.wait(deadline):
            for item in self._inbox.take_all():
                if isinstance(item, WorkerSettings):
                    self._settings = item
                else:
                    self._inbox.put(item)
            if self._settings is not None:
                return self._settings
        raise DeadlineExceeded(f"the agent sent no settings within {SETTINGS_LIMIT_S:g} s")

    def _listen(self, settings: WorkerSettings) -> str:
        if settings.link_transport == "tcp":
            return self._links.listen(f"tcp:{settings.link_host}:0")
        return self._links.listen(f"unix:{Path(settings.run_dir) / f'w{self._me}.sock'}")

    def _train(self, settings: WorkerSettings, address: str) -> None:
        description = describe_job(self._job)
        layout = self._layout = block_layout(description.layers)
        self._digest = description.digest
        start = find_start(self._job, description, layout, settings)
        self._agent.send(WorkerReady(worker=self._me, address=address, job=start.description, fingerprint=""))
        plan, first = self._await_admission()
        self._build(settings, start, plan, fresh=first)
        self._loop()

    def _await_admission(self) -> tuple[Plan, bool]:
        """The first plan that counts on this worker, and whether it is the first plan at all. Spares wait here."""
        first = True
        while True:
            self._agent.progress.alive()
            self._inbox.wait(time.monotonic() + WAIT_S)
            items = self._inbox.take_all()
            for index, item in enumerate(items):
                if isinstance(item, Plan):
                    if self._me in item.ids:
                        for rest in items[index + 1 :]:
                            self._inbox.put(rest)
                        return item, first
                    first = False
                elif isinstance(item, Received):
                    self._early.append(item)
                else:
                    self._handle_other(item)

    def _build(self, settings: WorkerSettings, start: Start, plan: Plan, *, fresh: bool) -> None:
        shape = ModelShape(len(self._job.layers), start.layout.blocks, shards_of_plan(start.layout, plan))
        facts = JobFacts(
            shape=shape,
            micro_batches=self._job.micro_batches,
            start_step=start.description.start_step,
            steps=self._job.steps,
        )
        self._protocol = StepProtocol(self._me, facts, plan)
        self._model = HostedModel(self._job, start.layout, self._device)
        runner = HopRunner(self._job, self._model, MicroBatchLoader(self._job), self._device)
        parts = ShellParts(
            job=self._job,
            shape=shape,
            protocol=self._protocol,
            model=self._model,
            runner=runner,
            accumulation=accumulation_of(self._job),
            links=self._links,
        )
        self._shell = ProtocolShell(parts, {}, self._on_phase, self._on_decided)
        self._executor = Executor(
            self._shell,
            runner,
            self._device,
            progress=self._agent.progress,
            faults=self._faults,
            report_work=self._agent.send,
            grant=self._grant if settings.unbuffered else None,
            log_cap_bytes=settings.log_cap_bytes,
        )
        self._gather = FinalGather(self._protocol, self._model, start.layout, self._ask_layer, self._send_layer)
        self._links.set_addresses(_addresses(plan, self._me))
        self._shell.perform()
        if fresh:
            self._protocol.start_fresh()
            self._shell.states.update(start.load(shape, tuple(self._protocol.copies), self._model))
        else:
            self._protocol.start_joining()
        self._executor.follow()
        self._shell.perform()
        self._report_wanted = True
        for item in self._early:
            self._handle_frame(item)
        self._early = []

    # ------------------------------------------------------------------ the loop

    def _loop(self) -> None:
        while not self._left:
            items = self._inbox.take_all()
            for item in items:
                self._handle(item)
            if items:
                self._executor.follow()
            if self._save_due is not None:
                self._save(self._save_due)
            if self._report_wanted:
                self._send_report()
            if self._left or self._executor.turn():
                continue
            self._finish_up()
            if self._report_wanted:
                continue
            self._agent.progress.alive()
            self._resync_due()
            self._inbox.wait(time.monotonic() + WAIT_S)

    def _handle(self, item: Item) -> None:
        if isinstance(item, Received):
            self._handle_frame(item)
        elif isinstance(item, Plan):
            self._adopt(item)
        else:
            self._handle_other(item)

    def _handle_other(self, item: Item) -> None:
        match item:
            case Injection():
                self._faults.add(item)
            case StopRequested():
                raise JobError(f"stopped by the agent: {item.reason}")
            case PeerClosed():
                self._peer_closed(item)
            case ConnectionRefused():
                self._agent.send(
                    UserLine(worker=self._me, text=f"worker {self._me} refused a connection: {item.error}")
                )
            case LinksFailed():
                raise item.error
            case _:
                pass

    def _adopt(self, plan: Plan) -> None:
        self._links.set_addresses(_addresses(plan, self._me))
        self._protocol.adopt(plan)
        self._executor.follow()
        self._shell.perform()
        self._report_wanted = True
        if plan.finished:
            self._left = True

    def _handle_frame(self, frame: Received) -> None:
        reader = Reader(frame.meta)
        if frame.kind in (FrameKind.LAYER_REQUEST, FrameKind.LAYER):
            layer = Layer(reader.number())
            if frame.kind == FrameKind.LAYER:
                self._gather.received(layer, _as_tensor(frame.payload))
            else:
                self._gather.requested(frame.peer, layer)
            return
        if frame.kind == FrameKind.GRANT:
            step, micro_batch, cut, backward = reader.numbers(4)
            self._executor.granted.add(EdgeKey(Step(step), micro_batch, cut, bool(backward)))  # type: ignore[arg-type]
            return
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
        self._reported_ready = report.hosted_ready
        self._reported_finished = report.finished
        self._agent.send(report)

    # ------------------------------------------------------------------ what happens in a step

    def _on_phase(self, step: Step, phase: str) -> None:
        self._agent.progress.begin(step, phase)
        self._faults.at(step, phase)

    def _on_decided(self, decision: Decision, update: Update) -> None:
        result = StepResult(
            step=decision.step,
            loss=exact_to_float(decision.loss.loss) / self._job.micro_batches,
            tokens=decision.loss.tokens,
            samples=decision.loss.samples,
            grad_norm=gradient_norm(decision.norm_squared),
            skipped=update.skip,
        )
        self._agent.send(StepReported(worker=self._me, result=result, received_at=time.monotonic()))
        if self._job.on_step is not None:
            text = self._job.on_step(result)
            if text and self._me == min(self._protocol.plan.ids):
                self._agent.send(UserLine(worker=self._me, text=text))
        self._note_save(Step(decision.step + 1))
        plan = self._protocol.plan
        self._report_wanted = self._report_wanted or self._protocol.step >= self._job.steps
        self._report_wanted = (
            self._report_wanted
            or bool(plan.queries)
            or any(self._me in group.joining or self._me in group.catch_up for group in plan.groups)
        )

    def _note_save(self, version: Step) -> None:
        """Which steps are saved is a function of the step number, so that it needs no agreement."""
        settings = self._settings
        if settings is not None and settings.save_every and settings.save_dir:
            if version % settings.save_every == 0 or version == self._job.steps:
                self._save_due = version

    def _save(self, version: Step) -> None:
        """Write the shards that are owned here; without all owners' parts the controller does not make an index."""
        self._save_due = None
        plan, copies = self._protocol.plan, self._protocol.copies
        mine = {
            shard: state
            for shard, state in self._shell.states.items()
            if plan.groups[shard].owner == self._me and copies.get(shard) == version
        }
        if not mine or self._settings is None:
            return
        with self._agent.progress.long_operation(SAVE_LIMIT_S):
            written = write_shards(
                Path(self._settings.save_dir),
                version,
                self._me,
                mine,
                shape=self._protocol.job.shape,
                layout=self._layout,
                job_digest=self._digest,
            )
        self._agent.send(written)

    def _finish_up(self) -> None:
        """After the last step: say so once everything is here, and help with the digest, if one is wanted."""
        if self._protocol.step < self._job.steps:
            return
        if not self._reported_finished and self._protocol.finished():
            self._report_wanted = True
        if self._settings is not None and self._settings.want_digest:
            digest = self._gather.turn(self._protocol.plan)
            if digest is not None:
                self._agent.send(FinalDigest(worker=self._me, parameters=digest))

    def _ask_layer(self, host: WorkerId, layer: Layer) -> None:
        self._links.send(host, FrameKind.LAYER_REQUEST, Writer().numbers(layer).finish())

    def _send_layer(self, to: WorkerId, layer: Layer, data: Tensor) -> None:
        self._links.send(to, FrameKind.LAYER, Writer().numbers(layer).finish(), bytes_of_tensor(data))

    # ------------------------------------------------------------------ peers

    def _grant(self, peer: WorkerId, key: EdgeKey) -> None:
        meta = Writer().numbers(key.step, key.micro_batch, key.cut, key.backward)
        self._links.send(peer, FrameKind.GRANT, meta.finish())

    def _peer_closed(self, closed: PeerClosed) -> None:
        """Frames to and from a peer may be lost: if the plan still counts on it, tell it everything again soon."""
        if closed.peer in self._protocol.plan.ids and not self._left:
            self._agent.send(LinkBroken(worker=self._me, peer=closed.peer, reason=closed.reason))
            self._resync.setdefault(closed.peer, time.monotonic() + RESYNC_AFTER_S)

    def _resync_due(self) -> None:
        now = time.monotonic()
        for peer in [peer for peer, due in self._resync.items() if due <= now]:
            del self._resync[peer]
            if peer in self._protocol.plan.ids:
                self._protocol.resync(peer)
                self._shell.perform()


def _addresses(plan: Plan, me: WorkerId) -> Mapping[WorkerId, str]:
    return {member.worker: member.address for member in plan.members if member.worker != me}


def _as_tensor(payload: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(payload)


def worker_of_environment(environment: Mapping[str, str] = os.environ) -> tuple[str, WorkerId] | None:
    """Agent socket and worker id that the agent has set; None outside a launched job."""
    socket, worker = environment.get("ELASWAVE_AGENT_SOCK"), environment.get("ELASWAVE_WORKER")
    if socket is None or worker is None:
        return None
    return socket, WorkerId(int(worker))
