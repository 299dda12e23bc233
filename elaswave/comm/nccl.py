"""Communicators of NCCL or RCCL behind an elastic group: the steps of core/native_edits.py, carried out.

The library is behind a Protocol; its binding is in nccl_binding.py. Never run on a GPU: see docs/communicators.md.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from torch import Tensor
from torch.futures import Future

from elaswave.comm.native import NativeCommunicator
from elaswave.core.ids import WorkerId
from elaswave.core.native_edits import (
    Abort,
    AwaitAsyncError,
    Grow,
    Initialise,
    MemberChange,
    NativeAbilities,
    NativeStep,
    Revoke,
    Shrink,
    plan_edit,
)
from elaswave.errors import DeadlineExceeded, EpochChanged, InvariantError, PeerError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

H = TypeVar("H")
"""What the library knows a communicator by."""

POLL_S = 0.001
"""The libraries tell of an end only who asks. Between two questions a thread waits so long for its cancellation."""


class NcclLibrary(Protocol[H]):
    """Calls of NCCL or RCCL on communicators that do not block: all return at once, but for `abort`.

    Errors of a call are raised as PeerError. A communicator is used by one thread at a time.
    """

    @property
    def abilities(self) -> NativeAbilities: ...

    def unique_id(self, parent: H | None) -> bytes:
        """Of a communicator to initialise, or of one that `parent` is to grow to."""

    def init_rank(self, size: int, rank: int, unique_id: bytes) -> H: ...

    def shrink(self, parent: H, excluded: tuple[int, ...], *, abort_in_flight: bool) -> H: ...

    def revoke(self, communicator: H) -> None: ...

    def grow(self, parent: H | None, size: int, rank: int | None, unique_id: bytes | None) -> H:
        """`rank`: of who joins, which has no parent. `unique_id`: for who joins and for the root."""

    def in_progress(self, communicator: H) -> bool:
        """Its asynchronous error: whether something is under way. Raises PeerError where that has failed."""

    def abort(self, communicator: H) -> None:
        """End it, whatever is under way. Nothing is called on it any more."""

    def all_reduce(self, communicator: H, tensor: Tensor) -> Callable[[], bool]:
        """Start the sum over all ranks; what is returned tells whether it has ended here."""


class NcclCommunicator(Generic[H]):
    """A communicator of the library as HybridGroup uses it."""

    def __init__(self, library: NcclLibrary[H], handle: H) -> None:
        """`handle` belongs to the new object."""
        self._library = library
        self._handle: H | None = handle
        self._lock = threading.Lock()

    def all_reduce(self, tensor: Tensor) -> "Future[list[Tensor]]":
        """The future fails with RuntimeError once the communicator has failed, is given away or is aborted."""
        with self._lock:
            if self._handle is None:
                raise PeerError("an all-reduce on a native communicator that was aborted or given away")
            has_ended = self._library.all_reduce(self._handle, tensor)
        future: Future[list[Tensor]] = Future()
        watch = threading.Thread(target=self._watch, args=(has_ended, tensor, future), name="elaswave-nccl-watch")
        watch.daemon = True  # it ends with the communicator; a process that forgets to abort that must still end
        watch.start()
        return future

    def _watch(self, has_ended: Callable[[], bool], tensor: Tensor, future: "Future[list[Tensor]]") -> None:
        tick = threading.Event()
        try:
            while not has_ended():
                with self._lock:
                    if self._handle is None:
                        raise PeerError("the native communicator was aborted")
                    self._library.in_progress(self._handle)
                tick.wait(POLL_S)
        except PeerError as error:
            future.set_exception(RuntimeError(str(error)))  # type: ignore[arg-type]
            return
        future.set_result([tensor])

    def give_away(self) -> H | None:
        """What the library knows it by, for an edit; from then on only that uses it. None if it was aborted."""
        with self._lock:
            handle, self._handle = self._handle, None
        return handle

    def abort(self) -> None:
        """End it; may block. Does nothing where it was aborted or given away."""
        handle = self.give_away()
        if handle is not None:
            self._library.abort(handle)


class NcclEditor(Generic[H]):
    """Makes the communicator of the members as they are now, of the one before where the library can."""

    def __init__(self, library: NcclLibrary[H], store: "Store", timeout_s: float) -> None:
        """store: where unique ids are told, the same for all ranks. timeout_s: limit of one edit."""
        self._library = library
        self._store = store
        self._timeout_s = timeout_s

    def edit(
        self,
        native: NativeCommunicator | None,
        name: str,
        change: MemberChange,
        me: WorkerId,
        cancelled: threading.Event,
    ) -> NcclCommunicator[H]:
        """Carry out `plan_edit`. `native` belongs to the edit: it is aborted, and so is all that was made if it fails.

        name: another one for each edit, the same on all ranks. Raises PeerError, DeadlineExceeded after the timeout,
        EpochChanged soon after `cancelled` was set.
        """
        parent = native.give_away() if isinstance(native, NcclCommunicator) else None
        if native is None:
            change = MemberChange(before=(), after=change.after) if me in change.before else change
        elif parent is None:
            raise PeerError(f"the native communicator to edit for {name!r} was aborted: build one from nothing")
        edit = _Edit(self._library, self._store, name, parent, cancelled)
        handle = edit.run(plan_edit(self._library.abilities, change, me), time.monotonic() + self._timeout_s)
        return NcclCommunicator(self._library, handle)


class _Edit(Generic[H]):
    """One run of steps, in one thread."""

    def __init__(
        self, library: NcclLibrary[H], store: "Store", name: str, parent: H | None, cancelled: threading.Event
    ) -> None:
        self._library = library
        self._store = store
        self._name = name
        self._cancelled = cancelled
        self._made: list[H | None] = [parent]
        self._alive = set() if parent is None else {0}
        self._deadline = 0.0

    def run(self, steps: tuple[NativeStep, ...], deadline: float) -> H:
        """The last communicator made. All that are left are aborted unless it is returned."""
        self._deadline = deadline
        finished = False
        try:
            for step in steps:
                self._take(step)
            finished = True
        finally:
            if not finished:
                self._abort_all()
        return self._of(len(self._made) - 1)

    def _take(self, step: NativeStep) -> None:
        library = self._library
        match step:
            case Revoke():
                library.revoke(self._of(step.of))
            case AwaitAsyncError():
                communicator = self._of(step.of)
                self._until(lambda: not library.in_progress(communicator), f"communicator {step.of}")
            case Shrink():
                self._add(library.shrink(self._of(step.of), step.excluded, abort_in_flight=step.abort_in_flight))
            case Grow():
                parent = None if step.of is None else self._of(step.of)
                unique_id = self._exchanged("grow", parent, is_root=step.root)
                needed = unique_id if step.root or parent is None else None
                self._add(library.grow(parent, step.size, step.rank, needed))
            case Abort():
                self._alive.discard(step.of)
                library.abort(self._of(step.of))
            case Initialise():
                unique_id = self._exchanged("initialise", None, is_root=step.rank == 0)
                self._add(library.init_rank(step.size, step.rank, unique_id))

    def _exchanged(self, use: str, parent: H | None, *, is_root: bool) -> bytes:
        """The unique id, told by the root. All ranks wait for it: the calls that use it may block until it is there.

        use: one for a grow is never taken for an init, should ranks not agree on which of them it is.
        """
        key = f"{self._name}/{use}"
        if is_root:
            unique_id = self._library.unique_id(parent)
            self._store.set(key, unique_id.hex())
            return unique_id
        self._until(lambda: self._store.check([key]), f"the unique id of rank 0 to {use}")
        return bytes.fromhex(self._store.get(key).decode())

    def _until(self, is_done: Callable[[], bool], what: str) -> None:
        while not is_done():
            if time.monotonic() >= self._deadline:
                raise DeadlineExceeded(
                    f"native communicator {self._name!r}: its timeout ended while it waited for {what}"
                )
            if self._cancelled.wait(POLL_S):
                raise EpochChanged(f"native communicator {self._name!r}: given up, the members have changed again")

    def _add(self, handle: H) -> None:
        self._alive.add(len(self._made))
        self._made.append(handle)

    def _of(self, number: int) -> H:
        handle = self._made[number]
        if handle is None:
            raise InvariantError(f"native communicator {self._name!r} is to be made of one that is not there")
        return handle

    def _abort_all(self) -> None:
        # The parent first: that is what ends the making of a child.
        for number in sorted(self._alive):
            with suppress(PeerError):  # what made the edit fail is being raised and says more
                self._library.abort(self._of(number))
        self._alive.clear()
