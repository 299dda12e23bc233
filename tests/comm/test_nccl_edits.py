"""Edits of native communicators carried out on a double of the library; threads play ranks. No GPU takes part."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from library_double import Handle, LibraryDouble, World

from elaswave.comm.nccl import NcclCommunicator, NcclEditor
from elaswave.comm.nccl_binding import Nccl4Py, version_of
from elaswave.core.ids import WorkerId
from elaswave.core.native_edits import MemberChange, NativeAbilities, change_of
from elaswave.errors import ConfigError, DeadlineExceeded, EpochChanged, PeerError

ALL = NativeAbilities(shrink=True, revoke=True, grow=True)
NONE = NativeAbilities()
LIMIT_S = 20.0

Communicator = NcclCommunicator[Handle]


class Gang:
    """Libraries and communicators of some ranks."""

    def __init__(self, abilities: NativeAbilities) -> None:
        self.abilities = abilities
        self.world = World()
        self.store = dist.HashStore()
        self.libraries: dict[int, LibraryDouble] = {}
        self.natives: dict[int, Communicator] = {}

    def edit(
        self,
        name: str,
        change: MemberChange,
        *,
        callers: Iterable[int] | None = None,
        limit_s: float = LIMIT_S,
        cancelled: threading.Event | None = None,
    ) -> dict[int, Communicator | Exception]:
        """All callers at once; what each of them got."""
        found = _at_once(
            change.after if callers is None else tuple(callers),
            lambda me: self._edit(me, name, change, limit_s, cancelled or threading.Event()),
        )
        self.natives |= {me: made for me, made in found.items() if isinstance(made, NcclCommunicator)}
        return found

    def _edit(
        self, me: int, name: str, change: MemberChange, limit_s: float, cancelled: threading.Event
    ) -> Communicator:
        library = self.libraries.setdefault(me, LibraryDouble(self.world, self.abilities))
        editor = NcclEditor(library, self.store, limit_s)
        return editor.edit(self.natives.pop(me, None), name, change, WorkerId(me), cancelled)

    def sums(self, members: Iterable[int]) -> set[float]:
        """An all-reduce of 1, 2, 4, ... by worker."""

        def reduce(me: int) -> float:
            tensor = torch.tensor([float(1 << me)])
            return float(self.natives[me].all_reduce(tensor).wait()[0])

        return {float(found) for found in _at_once(tuple(members), reduce).values() if isinstance(found, float)}

    def left(self, me: int) -> int:
        """Communicators of a rank that were not aborted."""
        return sum(not handle.aborted for handle in self.libraries[me].handles)


def _at_once(members: tuple[int, ...], run: Callable[[int], object]) -> "dict[int, object]":
    def caught(me: int) -> object:
        try:
            return run(me)
        except (DeadlineExceeded, EpochChanged, PeerError) as error:
            return error

    with ThreadPoolExecutor(len(members)) as pool:
        return dict(zip(members, pool.map(caught, members), strict=True))


def change(before: Iterable[int], after: Iterable[int]) -> MemberChange:
    return change_of(map(WorkerId, before), map(WorkerId, after))


def started(abilities: NativeAbilities, size: int) -> Gang:
    gang = Gang(abilities)
    gang.edit("start", change((), range(size)))
    assert gang.sums(range(size)) == {float(2**size - 1)}
    return gang


@pytest.mark.parametrize("abilities", [ALL, NativeAbilities(shrink=True), NONE], ids=str)
def test_losses_one_after_the_other(abilities: NativeAbilities) -> None:
    gang = started(abilities, 5)
    gang.edit("first", change(range(5), (0, 1, 3, 4)))
    assert gang.sums((0, 1, 3, 4)) == {27.0}
    gang.edit("second", change((0, 1, 3, 4), (1, 3, 4)))
    assert gang.sums((1, 3, 4)) == {26.0}
    assert [gang.left(me) for me in (1, 3, 4)] == [1, 1, 1]


@pytest.mark.parametrize("abilities", [ALL, NONE], ids=str)
def test_a_loss_and_a_new_rank_at_once(abilities: NativeAbilities) -> None:
    gang = started(abilities, 3)
    gang.edit("edit", change(range(3), (0, 2, 3)))
    assert gang.sums((0, 2, 3)) == {13.0}
    assert [gang.left(me) for me in (0, 2, 3)] == [1, 1, 1]


def test_a_second_loss_during_a_shrink_ends_it_and_all_is_built_from_nothing() -> None:
    gang = started(ALL, 4)
    found = gang.edit("shrink", change(range(4), (0, 2, 3)), callers=(0, 3), limit_s=0.05)
    assert [type(error) for error in found.values()] == [DeadlineExceeded] * 2
    assert "'shrink'" in str(found[0])
    assert [gang.left(me) for me in (0, 3)] == [0, 0]
    gang.edit("again", change((), (0, 3)))
    assert gang.sums((0, 3)) == {9.0}


def test_a_rank_that_is_awaited_in_vain_does_not_outlast_the_cancellation() -> None:
    gang = started(ALL, 3)
    cancelled = threading.Event()
    timer = threading.Timer(0.02, cancelled.set)
    timer.start()
    found = gang.edit("shrink", change(range(3), (0, 1)), callers=(0,), cancelled=cancelled)
    timer.join()
    assert isinstance(found[0], EpochChanged)
    assert gang.left(0) == 0


def test_an_operation_under_way_fails_when_its_communicator_is_edited() -> None:
    gang = started(ALL, 2)
    native = gang.natives[0]
    future = native.all_reduce(torch.ones(1))
    gang.edit("edit", change(range(2), (0,)))
    with pytest.raises(RuntimeError, match="aborted"):
        future.wait()
    with pytest.raises(PeerError, match="given away"):
        native.all_reduce(torch.ones(1))


def test_abort_twice_does_nothing_the_second_time() -> None:
    gang = started(ALL, 2)
    gang.natives[0].abort()
    gang.natives[0].abort()
    assert gang.left(0) == 0


def test_the_binding_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="pip install nccl4py"):
        Nccl4Py.load(0)


@pytest.mark.parametrize(("code", "version"), [(22703, (2, 27, 3)), (23004, (2, 30, 4))])
def test_versions_are_read(code: int, version: tuple[int, int, int]) -> None:
    assert version_of(code) == version
