"""The controller as one pure state machine: events in, effects out: docs/protocol.md."""

from elaswave.core.config import ControllerConfig
from elaswave.core.control.events_of_job import JobEvents
from elaswave.core.events import (
    AgentAttached,
    AgentLost,
    CheckpointWritten,
    Effect,
    Event,
    FinalDigest,
    JobEnded,
    LinkBroken,
    RestartAll,
    ShowLine,
    StepReported,
    StopRequested,
    Tick,
    UserLine,
    WorkDone,
    WorkerCleared,
    WorkerExited,
    WorkerFailed,
    WorkerReady,
    WorkerReport,
    WorkerStarted,
    WorkerSuspected,
)
from elaswave.core.ids import Step
from elaswave.core.status import JobStatus, WorkerStatus
from elaswave.errors import ConfigError, FaultError


class Controller(JobEvents):
    """Decides everything that concerns more than one worker. Performs nothing, reads no clock."""

    def __init__(self, config: ControllerConfig) -> None:
        super().__init__(config)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """What is to be done about `event`, in order. `now`: CLOCK_MONOTONIC seconds, never decreasing."""
        self.now = now
        if self.ended:
            return []
        try:
            self._dispatch(event)
        except ConfigError as error:
            self.end(93 if not self.step_seconds else 1, str(error))
        except FaultError as error:
            self.end(1, str(error))
        # The end comes last, whatever else the event has led to.
        effects = sorted(self.effects, key=lambda effect: isinstance(effect, JobEnded | RestartAll))
        self.effects = []
        if effects and isinstance(effects[-1], JobEnded):
            effects[-1:-1] = self.close_all_incidents()
        return effects

    def _dispatch(self, event: Event) -> None:
        match event:
            case AgentAttached():
                self.agent_attached(event)
            case AgentLost():
                self.agent_lost(event)
            case WorkerStarted():
                self.worker(event.worker).pid = event.pid
            case WorkerReady():
                self.worker_ready(event)
            case WorkerExited():
                self.worker_exited(event)
            case WorkerSuspected():
                self.worker_suspected(event)
            case WorkerCleared():
                self.worker_cleared(event)
            case WorkerFailed():
                self.worker_failed(event)
            case WorkerReport():
                self.worker_report(event)
            case StepReported():
                self.step_reported(event)
            case WorkDone():
                self.work_done(event)
            case FinalDigest():
                self.digest = event.parameters
                self.advance()
            case CheckpointWritten():
                self.checkpoint_written(event)
            case UserLine():
                self.effects.append(ShowLine(text=event.text))
            case LinkBroken():
                self.link_broken(event)
            case StopRequested():
                self.end(1, f"stopped: {event.reason}")
            case Tick():
                self.check_deadlines()

    def status(self) -> JobStatus:
        """The job for operators; its name and the pids are the shell's to fill in."""
        hosting = self.plan.hosting if self.plan is not None else {}
        workers = tuple(
            WorkerStatus(
                worker=record.worker,
                pid=record.pid,
                node=record.node,
                local_index=record.local_index,
                incarnation=record.incarnation,
                state=record.state.value,
                layers=hosting.get(record.worker, ()),
                step=self.steps_of.get(record.worker, Step(0)),
            )
            for record in self.workers.values()
        )
        return JobStatus(
            job="",
            epoch=self.plan.epoch if self.plan is not None else self.no_epoch,
            step=self.next_step,
            steps=self.job.steps if self.job is not None else 0,
            state=self.state_name(),
            workers=workers,
        )
