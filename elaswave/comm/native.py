"""A vendor's communicator (NCCL, RCCL, gloo) beside an elastic group: built behind the training, swapped in by a vote.

Such communicators are fast while nobody dies; when somebody does they are of no use until they were edited, where the
library can, or thrown away and built anew. So collectives go over the elastic group until every rank has the native
one, and again from the moment a member is lost. See docs/communicators.md, which also says what was run on which
hardware.
"""

import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from elaswave.comm.group import Group
from elaswave.comm.operators import combine_of
from elaswave.core.ids import WorkerId
from elaswave.core.native_edits import MemberChange, change_of
from elaswave.errors import DeadlineExceeded, EpochChanged, PeerError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.futures import Future

EDIT_FAILED, NOT_READY, READY = -1, 0, 1
"""Votes about the native communicator; the least one counts."""

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


@runtime_checkable
class NativeEditor(Protocol):
    """Makes a communicator, of the one before where it can: NcclEditor of nccl.py."""

    def edit(
        self,
        native: NativeCommunicator | None,
        name: str,
        change: MemberChange,
        me: WorkerId,
        cancelled: threading.Event,
    ) -> NativeCommunicator:
        """`native`, of `change.before`, is the editor's from now on; with None one is made from nothing.

        Blocks until all members of `change.after` have come; fails soon after `cancelled` was set.
        """


Make = Callable[[threading.Event], NativeCommunicator]
"""Makes a communicator; may give up once the event is set."""


class GlooCommunicator:
    """gloo as the native group: to prove the swap where there is no GPU. It cannot abort; it is left to time out."""

    def __init__(self, store: "Store", rank: int, size: int, timeout_s: float) -> None:
        self._group = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_s))

    def all_reduce(self, tensor: Tensor) -> "Future[list[Tensor]]":
        work: dist.Work = self._group.allreduce([tensor])  # type: ignore[attr-defined]
        return work.get_future()

    def abort(self) -> None:
        return None


class Build:
    """One attempt for one epoch, in a thread of its own, which no thread of the training waits for."""

    def __init__(self, make: Make, name: str, *, is_edit: bool) -> None:
        self.is_edit = is_edit
        self._make = make
        self._abandoned = threading.Event()
        self._lock = threading.Lock()
        self.made: NativeCommunicator | None = None
        self.error: Exception | None = None
        # A daemon: a constructor that waits for the dead cannot be ended, and must not keep the process.
        self._thread = threading.Thread(target=self._run, name=f"elaswave-native-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            made = self._make(self._abandoned)
        except Exception as error:  # outermost frame of the thread; `HybridGroup.build_error` reports it
            self.error = error
            return
        with self._lock:
            if not self._abandoned.is_set():
                self.made = made
                return
        made.abort()

    def abandon(self) -> None:
        """Of no use any more: end it behind the training."""
        made = self.give_away()
        if made is not None:
            threading.Thread(target=made.abort, name="elaswave-native-abort", daemon=True).start()

    def give_away(self) -> NativeCommunicator | None:
        """What was made, if it was, to somebody else; what is made later is aborted."""
        with self._lock:
            self._abandoned.set()
            made, self.made = self.made, None
        return made

    @property
    def vote(self) -> int:
        """What this rank has to say about it."""
        if self.made is not None:
            return READY
        return EDIT_FAILED if self.is_edit and self.error is not None else NOT_READY

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

    def __init__(self, group: Group, factory: NativeFactory | NativeEditor, name: str) -> None:
        self._group = group
        self._factory = factory
        self._name = name
        self._build: Build | None = None
        self._native: NativeCommunicator | None = None
        self._members: tuple[WorkerId, ...] = ()
        self._epoch = self._attempt = -1
        self.edit_error: Exception | None = None
        """Why the last edit was given up, on this rank, for building from nothing."""

    @property
    def is_native(self) -> bool:
        """Whether all-reduces go over the native communicator now."""
        return self._native is not None

    @property
    def build_error(self) -> Exception | None:
        """Why there is no native communicator in this epoch."""
        return self._build.error if self._build is not None else None

    def rearm(self, joined: Collection[WorkerId] = ()) -> None:
        """Make a native communicator of the members as they are now, behind the training; every rank calls it.

        One that was in use, which all ranks are agreed on, is edited if the factory is an editor; else it is dropped.
        joined: told by a rank that was added to others, all that were added with it; it joins what they have.
        """
        try:
            epoch, members = self._group.endpoint.membership(self._group.communicator)
        except PeerError:
            self.close()  # of no use any more; the next operation raises it too, and then this is called again
            return
        if joined:
            before = tuple(worker for worker in members if worker not in joined)
        else:
            before = self._members if self._native is not None else ()
        native = None
        if self._native is not None and self._build is not None and isinstance(self._factory, NativeEditor):
            native = self._build.give_away()
        attempt = self._attempt + 1 if epoch == self._epoch else 0
        self._start(native, change_of(before, members), epoch, attempt)

    def _start(self, native: NativeCommunicator | None, change: MemberChange, epoch: int, attempt: int) -> None:
        """`epoch` and `attempt` name it: the same on all ranks, whenever they begin."""
        self.close()
        self._members, self._epoch, self._attempt = change.after, epoch, attempt
        name = f"{self._name}/{epoch}/{attempt}"
        factory, me = self._factory, self._group.communicator.me
        rank, size = change.after.index(me), len(change.after)

        def make(cancelled: threading.Event) -> NativeCommunicator:
            if isinstance(factory, NativeEditor):
                return factory.edit(native, name, change, me, cancelled)
            return factory(name, rank, size)

        self._build = Build(make, name, is_edit=isinstance(factory, NativeEditor) and bool(change.before))

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
        sum_natively(self._group, self._native, tensor)

    def boundary(self) -> bool:
        """End of a step: all ranks have all results of it, or EpochChanged on all. Whether the next one is native."""
        vote = torch.tensor([NOT_READY if self._build is None else self._build.vote])
        minimum = combine_of(dist.ReduceOp.MIN, vote.dtype)
        self._group.endpoint.wait(self._group.all_reduce(vote, minimum))
        least = int(vote.item())
        if least == EDIT_FAILED:
            self.edit_error = self.build_error
            self._start(None, change_of((), self._members), self._epoch, self._attempt + 1)
        elif least == READY and self._build is not None:
            self._native = self._build.made
        return self.is_native


def sum_natively(group: Group, native: NativeCommunicator, tensor: Tensor) -> None:
    """`tensor` becomes the sum over the ranks of `native`, which are some or all of the group's.

    EpochChanged where the group loses a member meanwhile: what is in `tensor` then is undefined. PeerError where the
    native communicator fails otherwise.
    """
    communicator, endpoint = group.communicator, group.endpoint
    future = native.all_reduce(tensor)
    future.add_done_callback(lambda _: endpoint.wake())
    deadline = time.monotonic() + group.timeout_s
    endpoint.drive(lambda: future.done() or communicator.broken, deadline, "a native all-reduce")
    try:
        if not communicator.broken:
            future.wait()
            return
    except RuntimeError as error:
        _await_news(group, error)
    lost = EpochChanged("a member was lost: call reconfigure() and rearm(), and repeat the step")
    raise communicator.failure or lost


def _await_news(group: Group, error: RuntimeError) -> None:
    """The native operation has failed: the links will tell of a loss, or nobody is lost."""
    communicator = group.communicator
    with suppress(DeadlineExceeded):
        group.endpoint.drive(lambda: communicator.broken, time.monotonic() + NEWS_LIMIT_S, "news of a loss")
    if not communicator.broken:
        raise PeerError(f"the native communicator has failed, and all members are there: {error}") from error
