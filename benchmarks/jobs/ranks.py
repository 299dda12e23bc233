"""Gang: forked processes that a benchmark drives over pipes, and a TCPStore in a process of its own.

All are children of the benchmark, end with it whatever ends it, and are killed by their ids when a `Gang` is left.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from common import BenchmarkFailed

from elaswave.lifeline import end_with_parent

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

CALL_LIMIT_S = 120.0
AHEAD_S = 0.03
"""So long before a measured call begins do the ranks hear of it; then all start at the same moment."""

Rank = TypeVar("Rank")
Answer = TypeVar("Answer")
Arguments = ParamSpec("Arguments")


def wait_until(moment: float) -> None:
    """Sleep until this time of the monotonic clock, which all processes of a machine share."""
    time.sleep(max(0.0, moment - time.monotonic()))


def soon() -> float:
    """When a call that is made now should begin on all ranks."""
    return time.monotonic() + AHEAD_S


def host_store(pipe: "Connection[int, None]") -> None:
    """Serve a TCPStore until killed; its port goes into the pipe."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # type: ignore[attr-defined]
    pipe.send(store.port)
    while True:
        signal.pause()


def connect_store(port: int, limit: timedelta) -> "Store":
    """A client of the gang's store. A method of a rank calls it, never the benchmark itself: see `Gang`."""
    found: Store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, None, False, wait_for_workers=False, timeout=limit
    )
    return found


def part_of(store: "Store", name: str) -> "Store":
    """A store of its own within another."""
    found: Store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    return found


def fork(run: Callable[[], None]) -> int:
    """A child that does this and ends with the benchmark; its id."""
    me = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _run_child(me, run)
    return pid


def _run_child(parent: int, run: Callable[[], None]) -> NoReturn:
    try:
        # The benchmark unwinds at these and then ends its children itself.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_with_parent(parent)
        run()
    except BaseException:  # outermost frame of the process
        traceback.print_exc()
    os._exit(1)


class Gang(Generic[Rank]):
    """Processes 0 to size - 1, each with one object of `make(rank)`, whose methods `call` runs on all at once.

    A store is never opened in the benchmark itself: processes forked beside a TCPStore's thread hang about as often as
    not when they open theirs.
    """

    def __init__(self, size: int, make: Callable[[int], Rank]) -> None:
        self.size = size
        self.folder = Path(tempfile.mkdtemp(prefix="elaswave-gang-"))
        self.store_port = 0
        self._make = make
        self._pids: dict[int, int] = {}
        self._pipes: dict[int, Connection[Any, Any]] = {}
        self._store_pid: int | None = None

    def __enter__(self) -> "Gang[Rank]":
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _start(self) -> None:
        ours, theirs = Pipe()
        self._store_pid = fork(lambda: host_store(theirs))
        theirs.close()
        for rank in range(self.size):
            self._fork_rank(rank)
        if not ours.poll(CALL_LIMIT_S):
            raise BenchmarkFailed("the process of the store does not serve")
        self.store_port = int(ours.recv())
        ours.close()

    def _fork_rank(self, rank: int) -> None:
        ours, theirs = Pipe()

        def run() -> None:
            ours.close()
            for pipe in self._pipes.values():
                pipe.close()
            tempfile.tempdir = str(self.folder)  # what a killed rank leaves behind goes with the gang
            torch.set_num_threads(1)
            _serve(self._make(rank), theirs)

        self._pids[rank] = fork(run)
        self._pipes[rank] = ours
        theirs.close()

    def _end(self) -> None:
        pids = [*self._pids.values(), *([] if self._store_pid is None else [self._store_pid])]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        for pipe in self._pipes.values():
            pipe.close()
        self._pids.clear()
        self._pipes.clear()
        self._store_pid = None
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those that were not killed."""
        return tuple(self._pids)

    def kill(self, rank: int) -> tuple[float, float]:
        """SIGKILL it; when that was, and when it had ended, which takes a while where other processes want the CPU."""
        pid = self._pids[rank]
        moment = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ended = time.monotonic()
        del self._pids[rank]
        self._pipes.pop(rank).close()
        return moment, ended

    def start(
        self,
        method: Callable[Concatenate[Rank, Arguments], Answer],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Callable[[], dict[int, Answer]]:
        """Run a method on all ranks; what is returned waits for the answers of those that still live then."""
        for pipe in self._pipes.values():
            pipe.send((method, args, kwargs))
        return lambda: self._collect(method.__qualname__)

    def call(
        self,
        method: Callable[Concatenate[Rank, Arguments], Answer],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> dict[int, Answer]:
        """Run a method on all ranks; their answers. Raises BenchmarkFailed where one fails or is late."""
        return self.start(method, *args, **kwargs)()

    def _collect(self, what: str) -> dict[int, Answer]:
        deadline = time.monotonic() + CALL_LIMIT_S
        answers: dict[int, Answer] = {}
        for rank, pipe in self._pipes.items():
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise BenchmarkFailed(f"{what}: rank {rank} of {self.size} has not answered in {CALL_LIMIT_S:g} s")
                error, answer = pipe.recv()
            except EOFError as gone:
                raise BenchmarkFailed(f"{what}: rank {rank} of {self.size} has ended") from gone
            if error:
                raise BenchmarkFailed(f"{what}: rank {rank} of {self.size} failed\n{error}")
            answers[rank] = answer
        return answers


def _serve(served: Rank, pipe: "Connection[Any, Any]") -> None:
    while True:
        method, args, kwargs = pipe.recv()
        try:
            pipe.send(("", method(served, *args, **kwargs)))
        except Exception:  # of whatever is measured: the benchmark shows it
            pipe.send((traceback.format_exc(limit=8), None))


def span(times: Iterable[tuple[float, float]]) -> float:
    """Seconds from the first beginning to the last end."""
    taken = list(times)
    return max(ended for _, ended in taken) - min(begun for begun, _ in taken)
