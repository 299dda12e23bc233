"""A vendor's communicator (NCCL, RCCL, gloo) beside an elastic group: built behind the training, swapped in by a vote.

Such communicators are fast while nobody dies, and can only be thrown away when somebody does. So collectives go over
the elastic group until every rank has built the native one, and again from the moment a member is lost. See
docs/communicators.md, which also says what was run on which hardware.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from elaswave.comm.group import Group
from elaswave.comm.operators import combine_of
from elaswave.errors import DeadlineExceeded, EpochChanged, PeerError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.futures import Future

NEWS_LIMIT_S = 2.0
"""A native operation fails before or after the links tell who is lost: so long it waits for their word."""


class NativeCommunicator(Protocol):
    """Collectives of fixed members, any of which may die at any moment: then nothing more is known of it."""

    def all_reduce(self, tensor: Tensor) -> "Future[list[Tensor]]":
        """Start: `tensor` becomes the sum over all ranks."""

    def abort(self) -> None:
        """End it, whatever is under way; may block, never raises. Not followed by anything."""


class NativeFactory(Protocol):
    """Makes a communicator. `name`: another one each time, the same on all ranks. Blocks until all have come."""

    def __call__(self, name: str, rank: int, size: int) -> NativeCommunicator: ...


class GlooCommunicator:
    """gloo as the native group: to prove the swap where there is no GPU. It cannot abort; it is left to time out."""

    def __init__(self, store: "Store", rank: int, size: int, timeout_s: float) -> None:
        self._group = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_s))

    def all_reduce(self, tensor: Tensor) -> "Future[list[Tensor]]":
        work: dist.Work = self._group.allreduce([tensor])  # type: ignore[attr-defined]
        return work.get_future()

    def abort(self) -> None:
        return None


class _Build:
    """One attempt for one epoch, in a thread of its own, which no thread of the training waits for."""

    def __init__(self, make: Callable[[], NativeCommunicator], name: str) -> None:
        self._make = make
        self._abandoned = False
        self._lock = threading.Lock()
        self.made: NativeCommunicator | None = None
        self.error: Exception | None = None
        # A daemon: a constructor that waits for the dead cannot be ended, and must not keep the process.
        self._thread = threading.Thread(target=self._run, name=f"elaswave-native-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            made = self._make()
        except Exception as error:  # outermost frame of the thread; `HybridGroup.build_error` reports it
            self.error = error
            return
        with self._lock:
            if not self._abandoned:
                self.made = made
                return
        made.abort()

    def abandon(self) -> None:
        """Of no use any more: end it behind the training."""
        with self._lock:
            self._abandoned = True
            made, self.made = self.made, None
        if made is not None:
            threading.Thread(target=made.abort, name="elaswave-native-abort", daemon=True).start()

    def wait(self, deadline: float) -> bool:
        """Until it is built or has failed; whether it is built. For tests and for who wants to start with it."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return self.made is not None


class HybridGroup:
    """All-reduces over the native communicator where every rank has it, else over the elastic group. For one thread.

    A native all-reduce that meets a loss may have ended on some ranks only. So results are tentative until `boundary`,
    which every step calls before it uses them for good: it returns on all survivors or raises EpochChanged on all.
    After EpochChanged: `reconfigure()` of the process group, `rearm()`, and the step again.
    """

    def __init__(self, group: Group, factory: NativeFactory, name: str) -> None:
        self._group = group
        self._factory = factory
        self._name = name
        self._build: _Build | None = None
        self._native: NativeCommunicator | None = None

    @property
    def is_native(self) -> bool:
        """Whether all-reduces go over the native communicator now."""
        return self._native is not None

    @property
    def build_error(self) -> Exception | None:
        """Why there is no native communicator in this epoch."""
        return self._build.error if self._build is not None else None

    def rearm(self) -> None:
        """Drop the native communicator, if any, and build one of the members as they are now, behind the training."""
        self.close()
        communicator = self._group.communicator
        rank, size = communicator.rank, communicator.size
        name = f"{self._name}/{communicator.epoch}"
        self._build = _Build(lambda: self._factory(name, rank, size), name)

    def close(self) -> None:
        """Drop the native communicator, or the build of one, for good. The elastic group stays."""
        if self._build is not None:
            self._build.abandon()
        self._build = self._native = None

    def built(self, deadline: float) -> bool:
        """Wait for this rank's build to end; whether there is one."""
        return self._build is not None and self._build.wait(deadline)

    def all_reduce(self, tensor: Tensor) -> None:
        """`tensor` becomes the sum over all ranks; tentative until the next `boundary`. Raises EpochChanged."""
        endpoint = self._group.endpoint
        if self._native is None:
            endpoint.wait(self._group.all_reduce(tensor))
            return
        deadline = time.monotonic() + self._group.timeout_s
        future = self._native.all_reduce(tensor)
        future.add_done_callback(lambda _: endpoint.wake())
        endpoint.drive(lambda: future.done() or self._group.communicator.broken, deadline, "a native all-reduce")
        try:
            if not self._group.communicator.broken:
                future.wait()
                return
        except RuntimeError as error:
            self._await_news(error)
        raise EpochChanged("a member was lost: call reconfigure() and rearm(), and repeat the step")

    def _await_news(self, error: RuntimeError) -> None:
        """The native operation has failed: the links will tell of a loss, or nobody is lost."""
        communicator = self._group.communicator
        with suppress(DeadlineExceeded):
            self._group.endpoint.drive(lambda: communicator.broken, time.monotonic() + NEWS_LIMIT_S, "news of a loss")
        if not communicator.broken:
            raise PeerError(f"the native communicator has failed, and all members are there: {error}") from error

    def boundary(self) -> bool:
        """End of a step: all ranks have all results of it, or EpochChanged on all. Whether the next one is native."""
        ready = self._build is not None and self._build.made is not None
        vote = torch.tensor([int(ready)])
        minimum = combine_of(dist.ReduceOp.MIN, vote.dtype)
        self._group.endpoint.wait(self._group.all_reduce(vote, minimum))
        if vote.item() and self._build is not None:
            self._native = self._build.made
        return self.is_native
