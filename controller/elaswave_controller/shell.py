"""The shell around the core: one queue of events, effects in order, plans persisted before they are sent."""

import asyncio
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

from elaswave.core.events import (
    AgentAttached,
    AgentLost,
    CommitCheckpoint,
    Effect,
    Event,
    FenceWorker,
    IncidentClosed,
    JobEnded,
    PersistPlan,
    RestartAll,
    SendPlans,
    ShowLine,
    StartWorker,
    StepRecorded,
    StepReported,
    StopRequested,
    Tick,
    UserLine,
    WorkDone,
    WorkerExited,
    WorkerReport,
    WorkerStarted,
)
from elaswave.core.ids import NodeId, WorkerId
from elaswave.core.injection import Injection
from elaswave.core.settings import WorkerSettings
from elaswave.core.status import Finished, JobStatus
from elaswave.errors import ElasWaveError, InvariantError
from elaswave_controller.agents import AgentRegistry
from elaswave_controller.checkpoint import commit_checkpoint
from elaswave_controller.core import CoreFactory
from elaswave_controller.options import ControllerOptions
from elaswave_controller.plans import PlanLog
from elaswave_controller.report import Report
from elaswave_controller.restart import Restart
from elaswave_controller.store import Store
from elaswave_controller.watchers import Watchers

REFUSED = 93
"""Exit code of a job that was refused before its first step: it leaves no report."""

_STATUS_INTERVAL_S = 0.1  # how often watchers are sent the table of workers, at most
_QUIET_EVENTS = (WorkerReport, StepReported, WorkDone, UserLine, Tick)  # change nothing that the table shows


class Shell:
    """Runs one job's core. All methods belong to one event loop; `run` is the only consumer of events."""

    def __init__(self, options: ControllerOptions, make_core: CoreFactory, store: Store) -> None:
        self._options = options
        self._make_core = make_core
        self._core = make_core(options.config)
        self.agents = AgentRegistry()
        self.watchers = Watchers()
        self._plans = PlanLog(store, options.job)
        self._report = Report(job=options.job, config=options.config)
        self._restart = Restart(options.config, options.resume_from)
        self._events: asyncio.Queue[tuple[Event, float]] = asyncio.Queue()
        self._pids: dict[WorkerId, int] = {}
        self._told: set[NodeId] = set()
        self._now = 0.0
        self._injections = list(options.injections)
        self._checkpoints: asyncio.Queue[tuple[Path, CommitCheckpoint]] = asyncio.Queue()
        self._status_timer: asyncio.TimerHandle | None = None
        self._ended: JobEnded | None = None

    # -------------------------------------------------------------- told from outside

    def submit(self, event: Event, received_at: float | None = None) -> None:
        """Tell the core something; `received_at` is CLOCK_MONOTONIC seconds, by default now."""
        self._events.put_nowait((event, time.monotonic() if received_at is None else received_at))

    def status(self) -> JobStatus:
        """The job for operators."""
        status = self._core.status()
        workers = tuple(replace(worker, pid=self._pids.get(worker.worker, 0)) for worker in status.workers)
        return replace(status, job=self._options.job, workers=workers, incidents=self._report.incidents)

    def inject(self, injection: Injection) -> bool:
        """Cause a fault, now or at its step; False where no such worker is there."""
        if injection.worker not in self.agents.workers:
            return False
        self.agents.command(injection.worker, [injection])
        return True

    # -------------------------------------------------------------- the loop

    async def run(self) -> JobEnded:
        """Handle events until the job has ended; the report is written and operators are told.

        A bug in the core or here ends the job with exit code 1 and is shown.
        """
        committer = asyncio.create_task(self._commit_checkpoints(), name="checkpoints")
        try:
            while self._ended is None:
                await self._handle_next()
            ended = self._ended
        except Exception as error:
            trace = traceback.format_exc()
            sys.stderr.write(trace)
            ours = not isinstance(error, ElasWaveError) or isinstance(error, InvariantError)
            text = f"the controller failed: {error!r}\n{trace}" if ours else str(error)
            ended = JobEnded(exit_code=1, message=text)
        finally:
            await self._end_commits(committer)
        return self._finish(ended)

    async def _handle_next(self) -> None:
        event, received_at = await self._next_event()
        # A tick may have been stamped after an event that was received earlier but waited: the core's time never falls.
        self._now = now = max(self._now, received_at)
        wanted = self._keep_books(event)
        if self._restart.under_way:
            await self._go_on_with_restart(now)
            return
        if not wanted:
            return
        for effect in self._core.handle(event, now):
            await self._execute(effect)
            if self._ended is not None or self._restart.under_way:
                break
        if not isinstance(event, _QUIET_EVENTS):
            self._show_status_soon()

    async def _next_event(self) -> tuple[Event, float]:
        deadline = self._restart.deadline if self._restart.under_way else self._core.next_deadline()
        # What has arrived goes first, so that a late tick never overtakes what it waits for.
        if deadline is None or not self._events.empty():
            return await self._events.get()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await self._events.get()
        except TimeoutError:
            return Tick(), time.monotonic()

    def _keep_books(self, event: Event) -> bool:
        """Note what the shell itself needs; False where the core must not hear of it, as it knows already."""
        match event:
            case WorkerStarted():
                self._pids[event.worker] = event.pid
            case WorkerExited():
                self._forget(event.worker)
                # An agent confirms a fence once more where the worker had ended before it came.
                return not self._restart.is_past(event.worker)
            case AgentAttached():
                # After a restart of the job, the new core is told of all agents; one may be in the queue as well.
                known = event.node in self._told or self._restart.under_way
                self._told.add(event.node)
                return not known
            case AgentLost():
                for worker in self.agents.workers_of(event.node):
                    self._forget(worker)
                known = event.node in self._told
                self._told.discard(event.node)
                return known
            case StopRequested() if self._restart.under_way:
                self._ended = JobEnded(exit_code=1, message=f"stopped: {event.reason}")
            case _:
                pass
        return True

    def _forget(self, worker: WorkerId) -> None:
        self._pids.pop(worker, None)
        self.agents.forget_worker(worker)
        self._plans.forget(worker)
        self._restart.gone(worker)

    # -------------------------------------------------------------- effects

    async def _execute(self, effect: Effect) -> None:
        match effect:
            case PersistPlan():
                await self._plans.persist(effect)
            case SendPlans():
                self.agents.command(effect.worker, self._plans.take_unsent(effect.worker, effect.first_epoch))
            case FenceWorker():
                self.agents.fence(effect)
            case StartWorker():
                self._start(effect)
            case StepRecorded():
                self._record_step(effect)
                self.watchers.publish(effect.result)
            case IncidentClosed():
                self._report.record_incident(effect.incident)
                self.watchers.publish(effect.incident)
            case ShowLine():
                self.watchers.publish(effect)
            case CommitCheckpoint():
                if self._options.save_dir is None:
                    raise InvariantError(f"a checkpoint of step {effect.step} was written without --save-dir")
                self._checkpoints.put_nowait((self._options.save_dir, effect))
            case RestartAll():
                await self._begin_restart(effect)
            case JobEnded():
                self._ended = effect

    def _record_step(self, effect: StepRecorded) -> None:
        if not self._report.has_steps:
            # So that a short job, too, is shown with its epoch and its number of steps.
            self.watchers.publish(replace(self.status(), incidents=()))
            if self._options.report is not None:
                # Should everything be killed, the report of an earlier run must not be taken for this one's.
                self._options.report.unlink(missing_ok=True)
        self._report.record_step(effect)
        incident = self._restart.saw_step(effect.result.step, self._now)
        if incident is not None:
            self._report.record_incident(incident)
            self.watchers.publish(incident)

    def _start(self, effect: StartWorker) -> None:
        self._restart.saw_worker(effect.worker)
        self.agents.start(effect)
        options = self._options
        settings = WorkerSettings(
            worker=effect.worker,
            node=effect.node,
            token=options.token,
            run_dir=str(options.run_dir),
            save_dir="" if options.save_dir is None else str(options.save_dir),
            save_every=options.config.save_every,
            unbuffered=options.unbuffered,
            log_cap_bytes=options.log_cap_bytes,
            shard_elements=options.config.shard_elements,
            want_digest=options.config.want_report,
            resume_from=self._restart.resume_from,
            link_transport=options.link_transport,
            link_host=self.agents.link_host_of(effect.node),
        )
        mine = [injection for injection in self._injections if injection.worker == effect.worker]
        self._injections = [injection for injection in self._injections if injection.worker != effect.worker]
        self.agents.command(effect.worker, [settings, *mine])

    # -------------------------------------------------------------- checkpoints

    async def _commit_checkpoints(self) -> None:
        while True:
            save_dir, effect = await self._checkpoints.get()
            try:
                await self._commit(save_dir, effect)
            finally:
                self._checkpoints.task_done()

    async def _commit(self, save_dir: Path, effect: CommitCheckpoint) -> None:
        try:
            # In a thread: syncing a folder can take seconds, and a plan must not wait for it.
            folder = await asyncio.to_thread(commit_checkpoint, save_dir, effect)
        except (OSError, ElasWaveError) as error:
            self.watchers.publish(ShowLine(text=f"the checkpoint of step {effect.step} is NOT complete: {error}"))
            return
        self._restart.saw_checkpoint(str(folder))
        self.watchers.publish(ShowLine(text=f"checkpoint {folder}"))

    async def _end_commits(self, committer: asyncio.Task[None]) -> None:
        try:
            async with asyncio.timeout(self._options.shutdown_limit_s):
                await self._checkpoints.join()
        except TimeoutError:
            self.watchers.publish(ShowLine(text="a checkpoint was still being written and is not complete"))
        committer.cancel()
        await asyncio.wait([committer])

    # -------------------------------------------------------------- restart of the whole job

    async def _begin_restart(self, effect: RestartAll) -> None:
        await self._checkpoints.join()
        obstacle = self._restart.obstacle()
        if obstacle:
            self._ended = JobEnded(exit_code=1, message=f"{effect.reason}; {obstacle}")
            return
        self.watchers.publish(ShowLine(text=f"restart from {self._restart.resume_from}: {effect.reason}"))
        now = time.monotonic()
        self._restart.begin(self.agents.workers, effect.reason, now)
        for worker in sorted(self.agents.workers):
            self.agents.fence(FenceWorker(worker=worker, reason="the whole job restarts"))
        await self._go_on_with_restart(now)

    async def _go_on_with_restart(self, now: float) -> None:
        if self._ended is not None:
            return
        missing = self._restart.missing
        connections = tuple(self.agents.connections)
        lack = self._restart.lack(sum(connection.hello.workers for connection in connections))
        if lack:
            self._ended = JobEnded(exit_code=1, message=f"restart failed: {lack}")
        elif not missing:
            self._plans.start_over()
            self._core = self._make_core(self._restart.next_config(len(connections)))
            self._told.clear()
            for connection in connections:
                self.submit(AgentAttached(node=connection.hello.node, workers=connection.hello.workers), now)
        elif self._restart.deadline is not None and now >= self._restart.deadline:
            names = ", ".join(map(str, sorted(missing)))
            self._ended = JobEnded(exit_code=1, message=f"restart failed: the end of worker {names} is not confirmed")

    # -------------------------------------------------------------- operators and the end

    def _show_status_soon(self) -> None:
        if self._status_timer is None:
            loop = asyncio.get_running_loop()
            self._status_timer = loop.call_later(_STATUS_INTERVAL_S, self._show_status)

    def _show_status(self) -> None:
        self._status_timer = None
        self.watchers.publish(replace(self.status(), incidents=()))

    def _finish(self, ended: JobEnded) -> JobEnded:
        if self._status_timer is not None:
            self._status_timer.cancel()
        report = self._options.report
        if report is not None and ended.exit_code != REFUSED:
            try:
                self._report.write(report, ended)
            except (OSError, ValueError) as error:
                ended = replace(ended, exit_code=ended.exit_code or 1, message=f"no report {report}: {error}")
        self.watchers.publish(Finished(exit_code=ended.exit_code, message=ended.message))
        return ended
