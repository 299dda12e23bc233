"""Starts, watches and ends the workers of one node.

Owns for each worker: its pidfd (signals never go by pid), its progress page, and the queue to its socket. Tells
WorkerStarted once and WorkerExited once for each worker it was asked to start, in this order, with whatever the worker
itself said in between.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

import psutil

from elaswave.core.events import (
    StartWorker,
    WorkerCleared,
    WorkerExited,
    WorkerFailed,
    WorkerStarted,
    WorkerSuspected,
)
from elaswave.core.ids import WorkerId
from elaswave.errors import FaultError, ProtocolError
from elaswave.process_start import StartRequest
from elaswave.process_stat import Life, ProcessStat
from elaswave.progress import ProgressReader
from elaswave.wire import SupervisionEvent
from elaswave_agent.sockets import MAX_UNREAD_BYTES, Connection
from elaswave_agent.starters import ExitStatus, ProcessStarter, StartedProcess
from elaswave_agent.watch import KILLED, Memory, Sample, Suspect, WatchLimits, look

STATUS_LIMIT_S: Final = 5.0
"""A process that has ended is reaped at once; this only bounds the wait for a stuck zygote."""

TERMINATE_LIMIT_S: Final = 1.0
"""From SIGTERM to SIGKILL when the agent ends: the whole job has 5 s after Ctrl-C."""

KILL_LIMIT_S: Final = 2.0


class Listener(Protocol):
    """Where the supervisor tells what happens; the stream to the controller."""

    def event(self, event: SupervisionEvent) -> None: ...

    def failure(self, failure: WorkerFailed) -> None:
        """The agent tells in the name of a worker that cannot."""
        ...

    def worker_frame(self, worker: WorkerId, body: bytes) -> None:
        """Raises ProtocolError where `body` is no message."""
        ...

    def note(self, text: str) -> None:
        """A line for the agent's own log."""
        ...


@dataclass(slots=True, eq=False)
class _Worker:
    order: StartWorker
    page: ProgressReader
    process: StartedProcess | None = None
    inspector: psutil.Process | None = None
    stat: ProcessStat | None = None
    dying: bool = False
    """The kernel was seen ending it: nothing else is to be found out."""

    connection: Connection | None = None
    left: bool = False
    """Its link has ended: it needs no more messages."""

    queued: list[bytes] = field(default_factory=list)
    queued_bytes: int = 0
    signals: list[signal.Signals] = field(default_factory=list)
    """To be sent once the process exists."""

    memory: Memory = field(default_factory=Memory)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    """Workers of one node. Use from one event loop only.

    `request_for` says what to start for an order; `run_task` owns the tasks that starting and ending take.
    """

    def __init__(
        self,
        starter: ProcessStarter,
        request_for: Callable[[StartWorker], StartRequest],
        listener: Listener,
        run_task: Callable[[Coroutine[None, None, None]], object],
    ) -> None:
        self._starter = starter
        self._request_for = request_for
        self._listener = listener
        self._run_task = run_task
        self._limits = WatchLimits()
        self._ending = False
        self._workers: dict[WorkerId, _Worker] = {}
        self._exited: dict[WorkerId, WorkerExited] = {}

    # -------------------------------------------------------------- orders

    def start(self, order: StartWorker) -> None:
        """Begin to start a worker; WorkerStarted or WorkerExited follows."""
        if self._ending or order.worker in self._workers or order.worker in self._exited:
            why = "the agent is ending" if self._ending else "it was started before"
            self._listener.note(f"worker {order.worker} is not started: {why}")
            return
        worker = _Worker(order, ProgressReader.create())
        self._workers[order.worker] = worker
        self._run_task(self._start(worker))

    def fence(self, worker: WorkerId, reason: str) -> None:
        """SIGKILL; WorkerExited confirms it, again where the worker has ended before."""
        self._listener.note(f"fencing worker {worker}: {reason}")
        if worker in self._workers:
            self.send_signal(worker, signal.SIGKILL)
            return
        now = time.monotonic()
        never = WorkerExited(worker=worker, exit_code=0, signal=int(signal.SIGKILL), noticed_at=now, last_alive_at=now)
        self._listener.event(self._exited.get(worker, never))

    def send_signal(self, worker: WorkerId, number: signal.Signals) -> None:
        """Send a signal to a living worker, or as soon as it exists."""
        found = self._workers.get(worker)
        if found is None:
            self._listener.note(f"worker {worker} has ended or was never here: {number.name} is not sent")
        elif found.process is None:
            found.signals.append(number)
        else:
            _send_signal(found.process.pidfd, number)

    def forward(self, worker: WorkerId, frame: bytes) -> None:
        """Pass a frame to the worker, when it has connected."""
        found = self._workers.get(worker)
        if found is None or found.left:
            return  # it has ended, or will: nothing can matter to it any more
        if found.connection is not None:
            if not found.connection.send(frame):
                self._give_up(worker)
            return
        found.queued.append(frame)
        found.queued_bytes += len(frame)
        if found.queued_bytes > MAX_UNREAD_BYTES:
            self._give_up(worker)

    # -------------------------------------------------------------- what sockets ask and tell

    def admit(self, worker: WorkerId, pid: int) -> int | None:
        """The page's descriptor, if this process is that worker. Before its pid is known, any of this user's is."""
        found = self._workers.get(worker)
        if found is None or (found.process is not None and found.process.pid != pid):
            return None
        return found.page.descriptor

    def linked(self, worker: WorkerId, connection: Connection) -> None:
        """Hand over what has waited for the worker."""
        found = self._workers[worker]
        found.connection = connection
        queued, found.queued, found.queued_bytes = found.queued, [], 0
        for frame in queued:
            self.forward(worker, frame)

    def unlinked(self, worker: WorkerId, connection: Connection) -> None:
        """The worker's script is past its training, or the process is dying."""
        found = self._workers.get(worker)
        if found is not None and found.connection is connection:
            found.connection = None
            found.left = True

    def frame(self, worker: WorkerId, body: bytes) -> None:
        """Raises ProtocolError where `body` is no message."""
        self._listener.worker_frame(worker, body)

    def broke_protocol(self, worker: WorkerId, error: ProtocolError) -> None:
        """A worker that sends garbage is not to be trusted with the job's state."""
        self._listener.failure(WorkerFailed(worker=worker, kind="bug", message=str(error), traceback=""))
        self.fence(worker, str(error))

    # -------------------------------------------------------------- watching

    @property
    def living(self) -> list[tuple[WorkerId, int]]:
        """Workers whose processes exist, with their pids."""
        return [(worker, found.process.pid) for worker, found in self._workers.items() if found.process is not None]

    def sweep(self) -> None:
        """Look at every worker once; to be called about four times a second."""
        for worker, found in self._workers.items():
            if found.inspector is not None and not found.dying:
                self._look(worker, found, found.inspector)

    def notice_dying(self) -> None:
        """Suspect workers that the kernel has begun to end; to be called as often as a loss is to be noticed soon."""
        for worker, found in self._workers.items():
            if found.stat is not None and not found.dying and found.stat.life() is Life.DYING:
                found.dying = True
                if found.memory.suspected is None and not self._ending:
                    self._tell_dying(worker, found)

    async def end_all(self) -> None:
        """End all workers: SIGTERM, after TERMINATE_LIMIT_S SIGKILL. Raises FaultError where one stays.

        One that the kernel is still ending after KILL_LIMIT_S, to free its memory, is left to it.
        """
        self._ending = True
        await self._signal_all(signal.SIGTERM, TERMINATE_LIMIT_S)
        await self._signal_all(signal.SIGKILL, KILL_LIMIT_S)
        # Ends starts that are still under way, and is the zygote's order to kill what it started for us.
        self._starter.close()
        self.notice_dying()
        await self._await_ends(KILL_LIMIT_S)
        stay = sorted(worker for worker, found in self._workers.items() if not found.dying)
        if stay:
            raise FaultError(f"workers {stay} did not end within {KILL_LIMIT_S} s of SIGKILL")
        if self._workers:
            self._listener.note(f"workers {sorted(self._workers)} are still being ended by the kernel")

    async def _signal_all(self, number: signal.Signals, limit_s: float) -> None:
        for worker in self._workers:
            self.send_signal(worker, number)
        await self._await_ends(limit_s)

    async def _await_ends(self, limit_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                for found in list(self._workers.values()):
                    if not found.dying:
                        await found.ended.wait()

    def _look(self, worker: WorkerId, found: _Worker, inspector: psutil.Process) -> None:
        now = time.monotonic()
        try:
            with inspector.oneshot():
                state = str(inspector.status())
                times = inspector.cpu_times()
        except psutil.NoSuchProcess:
            return  # its pidfd tells
        found.memory, verdict = look(
            found.memory,
            Sample(now=now, state=state, signs=found.page.signs(), cpu_s=times.user + times.system),
            self._limits,
        )
        if isinstance(verdict, Suspect):
            self._suspect(worker, found, verdict, now)
        elif verdict is not None:
            self._listener.event(WorkerCleared(worker=worker, evidence=verdict.evidence))

    def _tell_dying(self, worker: WorkerId, found: _Worker) -> None:
        now = time.monotonic()
        if found.connection is not None:
            found.connection.drain()  # what it said before: less is done again
        self._suspect(worker, found, Suspect(cause=KILLED, evidence="the kernel is ending the process"), now)

    def _suspect(self, worker: WorkerId, found: _Worker, verdict: Suspect, now: float) -> None:
        progress, last_alive_at = found.page.read()
        self._listener.event(
            WorkerSuspected(
                worker=worker,
                cause=verdict.cause,
                evidence=verdict.evidence,
                noticed_at=now,
                last_alive_at=last_alive_at,
                progress=progress,
            )
        )

    # -------------------------------------------------------------- start and end of a process

    async def _start(self, found: _Worker) -> None:
        worker = found.order.worker
        try:
            process = await self._starter.start(self._request_for(found.order))
        except (FaultError, ProtocolError, OSError) as error:
            self._listener.failure(WorkerFailed(worker=worker, kind="config", message=str(error), traceback=""))
            self._finish(found, ExitStatus(exit_code=1), time.monotonic())
            return
        found.process = process
        with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            found.stat = ProcessStat.open(process.pid)
            found.inspector = psutil.Process(process.pid)
        self._listener.event(WorkerStarted(worker=worker, pid=process.pid))
        for number in found.signals:
            _send_signal(process.pidfd, number)
        asyncio.get_running_loop().add_reader(process.pidfd, self._notice_exit, found, process)

    def _notice_exit(self, found: _Worker, process: StartedProcess) -> None:
        noticed_at = time.monotonic()
        asyncio.get_running_loop().remove_reader(process.pidfd)
        self._run_task(self._end(found, process, noticed_at))

    async def _end(self, found: _Worker, process: StartedProcess, noticed_at: float) -> None:
        worker = found.order.worker
        try:
            async with asyncio.timeout(STATUS_LIMIT_S):
                status = await process.status()
        except (TimeoutError, FaultError) as error:
            self._listener.note(f"the exit status of worker {worker} is not known, taken for SIGKILL: {error}")
            status = ExitStatus(signal=signal.SIGKILL)
        self._finish(found, status, noticed_at)
        # Last: a signal sent to a closed descriptor might reach whatever has its number by then.
        os.close(process.pidfd)

    def _finish(self, found: _Worker, status: ExitStatus, noticed_at: float) -> None:
        worker = found.order.worker
        if found.connection is not None:
            # What it said before its end is told before its end. Reading its last byte closes it.
            found.connection.drain()
        if found.connection is not None:
            found.connection.close()  # a child of the worker holds the other end open
        progress, last_alive_at = found.page.read()
        found.page.close()
        if found.stat is not None:
            found.stat.close()
            found.stat = None
        del self._workers[worker]
        self._exited[worker] = WorkerExited(
            worker=worker,
            exit_code=status.exit_code,
            signal=status.signal,
            noticed_at=noticed_at,
            last_alive_at=last_alive_at,
            progress=progress,
        )
        self._listener.event(self._exited[worker])
        found.ended.set()

    def _give_up(self, worker: WorkerId) -> None:
        self.fence(worker, f"it has left {MAX_UNREAD_BYTES} bytes of messages unread")


def _send_signal(pidfd: int, number: signal.Signals) -> None:
    # ProcessLookupError: it has ended, and its pidfd tells so.
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)
