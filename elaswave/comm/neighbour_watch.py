"""Notices that the kernel has begun to end a process of this host, before its sockets close (elaswave.process_stat).

Each process watches one other, the next of those that it does not know to be gone: together they watch all.
"""

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

from elaswave.core.ids import WorkerId
from elaswave.process_stat import Life, ProcessStat

PERIOD_S: Final = 0.015
"""A look costs 40 to 130 us of a processor, the more the more others want it: at most 0.9 % of one."""


class NeighbourWatch:
    """One thread; `on_dying` is called in it, once for a process."""

    def __init__(self, me: WorkerId, processes: Mapping[WorkerId, int], on_dying: Callable[[WorkerId], None]) -> None:
        """processes: ids of those of this host, that of `me` among them or not."""
        others = sorted(worker for worker in processes if worker != me)
        self._round = [worker for worker in others if worker > me] + [worker for worker in others if worker < me]
        self._processes = dict(processes)
        self._on_dying = on_dying
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="elaswave-neighbour-watch", daemon=True)

    def start(self) -> None:
        """Begin, where there is anybody to watch."""
        if self._round:
            self._thread.start()

    def close(self) -> None:
        """End the thread; idempotent."""
        self._end.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        for worker in self._round:
            if self._watch(worker) is Life.DYING:
                self._on_dying(worker)
            if self._end.is_set():
                return

    def _watch(self, worker: WorkerId) -> Life:
        """What has become of it; as long as it runs, until the end of the watch."""
        stat: ProcessStat | None = None
        with suppress(OSError):
            stat = ProcessStat.open(self._processes[worker])
        if stat is None:
            return Life.ENDED
        try:
            while (life := stat.life()) is Life.RUNS and not self._end.wait(PERIOD_S):
                pass
            return life
        finally:
            stat.close()


def own_process() -> str:
    """This process as others of the same PID namespace can find it below /proc; the same text means the same process.

    `NAMESPACE:PID`; PID is 0 where /proc is not that of this process's own namespace.
    """
    seen = int(os.readlink("/proc/self")) == os.getpid()
    return f"{os.stat('/proc/self/ns/pid').st_ino}:{os.getpid() if seen else 0}"


def process_of(text: str, looker: str) -> int:
    """Process id behind what `own_process` has given, for another process of the host; 0 where that cannot find it."""
    namespace, _, pid = text.partition(":")
    return int(pid) if namespace == looker.partition(":")[0] else 0
