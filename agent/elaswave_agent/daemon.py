"""One agent: sockets, supervision and the stream to the controller, wired together in one event loop."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Mapping

from elaswave.core.events import FenceWorker, StartWorker, WorkerExited, WorkerFailed, WorkerStarted
from elaswave.core.ids import WorkerId
from elaswave.errors import InvariantError
from elaswave.process_start import StartRequest
from elaswave.wire import SupervisionEvent
from elaswave_agent import wire
from elaswave_agent.environment import worker_environment
from elaswave_agent.options import AgentOptions
from elaswave_agent.orders import ControllerBeat, Forward, InjectNow, Order, Shutdown
from elaswave_agent.sockets import WorkerSockets
from elaswave_agent.starters import FallbackStarter, ForkStarter, ProcessStarter, SpawnStarter
from elaswave_agent.step_reports import StepReports
from elaswave_agent.stream import ControllerStream, StreamSettings
from elaswave_agent.supervisor import Supervisor

GLANCE_PERIOD_S = 0.02
GLANCES_PER_SWEEP = 12
SWEEPS_PER_REPETITION = 4  # so that the status shows a worker's step a second late at most
LEAVE_LIMIT_S = 1.0


class Agent:
    """Runs the workers of one node until it is told to stop, or has lost the controller for good.

    Made in the event loop that `run` then runs in.
    """

    def __init__(self, options: AgentOptions, token: str, link_host: str) -> None:
        """link_host: numeric address at which its workers accept links."""
        self._options = options
        self._link_host = link_host
        self._ready: dict[WorkerId, wire.Request] = {}
        self._stop = asyncio.Event()
        self._error: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._supervisor = Supervisor(_starter(options, self.note), self._request_for, self, self._own)
        self._sockets = WorkerSockets(options.socket_path, self._supervisor)
        self._stream = ControllerStream(
            StreamSettings(
                controller=options.controller,
                node=options.node,
                token=token,
                limit_s=options.controller_limit_s,
                silence_s=options.node_suspect_s,
                tls=options.tls,
            ),
            self._greeting,
            self._obey,
            self.note,
        )
        self._steps = StepReports(self._stream.send)

    async def run(self) -> None:
        """Returns after a clean end. Raises ConfigError, FaultError, and what a task of ours raised."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._callback_failed)
        loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        # With a launcher, Ctrl-C is its business: it reaches all processes of the group, and one has to decide.
        if self._options.parent_pid is None:
            loop.add_signal_handler(signal.SIGINT, self._stop.set)
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._sockets.open()
        sweeping = self._own(self._sweep())
        streaming = self._own(self._stream.run())
        await self._stop.wait()
        sweeping.cancel()
        try:
            await self._supervisor.end_all()
        finally:
            self._sockets.close()
        if self._error is None:
            # Without a Leave the controller takes the end of the stream for a crash, which an error is.
            self._stream.leave()
            await asyncio.wait([streaming], timeout=LEAVE_LIMIT_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._error is not None:
            raise self._error

    # -------------------------------------------------------------- tasks

    def _own(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run as a task of the agent: an error that ends it ends the agent."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._fail(task.exception())

    def _callback_failed(self, loop: asyncio.AbstractEventLoop, context: Mapping[str, object]) -> None:
        error = context.get("exception")
        loop.default_exception_handler(dict(context))
        self._fail(error if isinstance(error, BaseException) else InvariantError(str(context.get("message"))))

    def _fail(self, error: BaseException | None) -> None:
        self._error = self._error or error
        self._stop.set()

    async def _sweep(self) -> None:
        while True:
            for _ in range(SWEEPS_PER_REPETITION):
                for _ in range(GLANCES_PER_SWEEP):
                    await asyncio.sleep(GLANCE_PERIOD_S)
                    self._supervisor.notice_dying()
                self._supervisor.sweep()
            self._steps.tell_repetitions()

    # -------------------------------------------------------------- told by the supervisor

    def event(self, event: SupervisionEvent) -> None:
        """Pass on to the controller."""
        if isinstance(event, WorkerExited):
            self._ready.pop(event.worker, None)
            self._steps.forget(event.worker)
        self._stream.send(wire.encode_event(event))

    def failure(self, failure: WorkerFailed) -> None:
        """Pass on to the controller, as if the worker had said it."""
        self._stream.send(wire.encode_failure(failure, time.monotonic()))

    def worker_frame(self, worker: WorkerId, body: bytes) -> None:
        """Pass on to the controller. Raises ProtocolError where `body` is no message."""
        request = wire.wrap_worker_frame(worker, body, time.monotonic())
        if wire.is_ready(request):
            self._ready[worker] = request
        step = wire.reported_step(request)
        if step is None:
            self._stream.send(request)
        else:
            self._steps.take(worker, step, request)

    def note(self, text: str) -> None:
        """A line on stderr, which is the launcher's."""
        sys.stderr.write(f"elaswave agent {self._options.node}: {text}\n")
        sys.stderr.flush()

    # -------------------------------------------------------------- told by the controller

    def _greeting(self, again: bool) -> list[wire.Request]:
        options = self._options
        hello = wire.encode_hello(
            options.node, options.workers, os.getpid(), host=socket.gethostname(), link_host=self._link_host
        )
        if not again:
            return [hello]
        # Another controller, or one that took us for dead: what lives here, and what it said when it was ready.
        living = [wire.encode_event(WorkerStarted(worker=worker, pid=pid)) for worker, pid in self._supervisor.living]
        return [hello, *living, *self._ready.values()]

    def _obey(self, order: Order) -> None:
        supervisor = self._supervisor
        match order:
            case StartWorker():
                supervisor.start(order)
            case FenceWorker():
                supervisor.fence(order.worker, order.reason)
            case Forward():
                supervisor.forward(order.worker, order.frame)
            case InjectNow():
                number = signal.SIGKILL if order.action == "kill" else signal.SIGSTOP
                supervisor.send_signal(order.worker, number)
            case Shutdown():
                self.note(f"shutting down: {order.reason}")
                self._stop.set()
            case ControllerBeat():
                pass

    def _request_for(self, order: StartWorker) -> StartRequest:
        folder = self._options.node_log_dir
        return StartRequest(
            worker=order.worker,
            program=self._options.program,
            environment=worker_environment(self._options, order, os.environ),
            working_directory=os.getcwd(),
            stdout=str(folder / f"rank_{order.rank}.out"),
            stderr=str(folder / f"rank_{order.rank}.err"),
        )


def _starter(options: AgentOptions, note: Callable[[str], None]) -> ProcessStarter:
    if options.zygote is None:
        return SpawnStarter()
    return FallbackStarter(ForkStarter(options.zygote), SpawnStarter(), note)
