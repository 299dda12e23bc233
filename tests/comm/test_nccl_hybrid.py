"""HybridGroup over the double of NCCL: ranks are threads, and a stand-in is the elastic group."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch
import torch.distributed as dist
from library_double import LibraryDouble, World
from torch import Tensor

from elaswave.comm.native import HybridGroup
from elaswave.comm.nccl import NcclEditor
from elaswave.core.ids import WorkerId
from elaswave.core.native_edits import NativeAbilities

ALL = NativeAbilities(shrink=True, revoke=True, grow=True)
LIMIT_S = 20.0
SHORT_S = 1.0


class Everybody:
    """Members and epoch, the same for all ranks at once, and votes among them."""

    def __init__(self, members: tuple[WorkerId, ...]) -> None:
        self.epoch = -1
        self.change(members)

    def change(self, members: tuple[WorkerId, ...]) -> None:
        self.epoch += 1
        self.members = members
        self.barrier = threading.Barrier(len(members), timeout=LIMIT_S)
        self.votes: dict[WorkerId, int] = {}


class StandIn:
    """One rank's elastic group, as far as HybridGroup knows it; an all-reduce has ended when it returns."""

    timeout_s = LIMIT_S

    def __init__(self, everybody: Everybody, me: WorkerId) -> None:
        self._everybody = everybody
        self._me = me
        self.endpoint = self
        self.after_vote: Callable[[], None] = lambda: None

    @property
    def communicator(self) -> SimpleNamespace:
        everybody = self._everybody
        members, epoch = everybody.members, everybody.epoch
        return SimpleNamespace(
            me=self._me,
            rank=members.index(self._me) if self._me in members else 0,
            size=len(members),
            members=members,
            epoch=epoch,
            broken=False,
        )

    def membership(self, communicator: object) -> tuple[int, tuple[WorkerId, ...]]:
        return self._everybody.epoch, self._everybody.members

    def all_reduce(self, tensor: Tensor, combine: object = None) -> None:
        barrier, votes = self._everybody.barrier, self._everybody.votes
        votes[self._me] = int(tensor)
        barrier.wait()
        tensor.fill_(min(votes.values()))
        barrier.wait()
        self.after_vote()

    def wait(self, operation: object) -> None:
        return None

    def wake(self) -> None:
        return None

    def drive(self, is_done: Callable[[], bool], deadline: float, what: str) -> None:
        tick = threading.Event()
        while not is_done():
            assert time.monotonic() < deadline, what
            tick.wait(0.001)


class Jobs:
    """Hybrid groups of ranks."""

    def __init__(self, *numbers: int, limit_s: float) -> None:
        self.everybody = Everybody(tuple(WorkerId(number) for number in numbers))
        self.world = World()
        self.libraries: dict[WorkerId, LibraryDouble] = {}
        self.store = dist.HashStore()
        self.limit_s = limit_s
        self.groups: dict[WorkerId, HybridGroup] = {}

    def group(self, me: WorkerId) -> HybridGroup:
        if me in self.groups:
            return self.groups[me]
        library = self.libraries[me] = LibraryDouble(self.world, ALL)
        editor = NcclEditor(library, self.store, self.limit_s)
        made = HybridGroup(StandIn(self.everybody, me), editor, "job")  # type: ignore[arg-type]
        self.groups[me] = made
        return made

    def all(self, call: Callable[[HybridGroup], object]) -> dict[WorkerId, object]:
        members = self.everybody.members
        groups = [self.group(me) for me in members]
        with ThreadPoolExecutor(len(members)) as pool:
            return dict(zip(members, pool.map(call, groups), strict=True))

    def swap(self) -> set[object]:
        """Every rank waits for its build, then all vote."""
        self.all(lambda group: group.built(time.monotonic() + LIMIT_S))
        return set(self.all(lambda group: group.boundary()).values())

    def sums(self) -> set[float]:
        def one(group: HybridGroup) -> float:
            tensor = torch.ones(3)
            group.all_reduce(tensor)
            return float(tensor[0])

        found = self.all(one)
        return {value for value in found.values() if isinstance(value, float)}

    def close(self) -> None:
        for group in self.groups.values():
            group.close()
        assert self.world.refused == []


def started(*numbers: int, limit_s: float = LIMIT_S) -> Jobs:
    jobs = Jobs(*numbers, limit_s=limit_s)
    jobs.all(lambda group: group.rearm())
    assert jobs.swap() == {True}
    assert jobs.sums() == {float(len(numbers))}
    for library in jobs.libraries.values():
        library.calls.clear()
    return jobs


def test_losses_and_a_join_are_edits() -> None:
    jobs = started(0, 1, 2, 3)
    jobs.everybody.change((WorkerId(0), WorkerId(3), WorkerId(2)))  # as elastic groups do: the last takes the place
    jobs.all(lambda group: group.rearm())
    assert jobs.swap() == {True}
    assert jobs.sums() == {3.0}
    newcomer = WorkerId(4)
    jobs.everybody.change((*jobs.everybody.members, newcomer))
    joining = jobs.group(newcomer)
    jobs.all(lambda group: group.rearm(joined=(newcomer,)) if group is joining else group.rearm())
    assert jobs.swap() == {True}
    assert jobs.sums() == {4.0}
    edited = ["revoke", "shrink", "abort", "revoke", "grow", "abort"]
    assert [jobs.libraries[WorkerId(me)].calls for me in (0, 2, 3)] == [edited] * 3
    assert jobs.libraries[newcomer].calls == ["grow"]
    jobs.close()


def test_who_joins_ranks_that_have_nothing_builds_with_them_after_its_deadline() -> None:
    jobs = Jobs(0, 1, 2, limit_s=SHORT_S)
    joining = jobs.group(WorkerId(2))
    jobs.all(lambda group: group.rearm(joined=(WorkerId(2),)) if group is joining else group.rearm())
    assert jobs.swap() == {False}
    assert "waited for the unique id of rank 0 to grow" in str(joining.edit_error)
    assert jobs.swap() == {True}
    assert jobs.sums() == {3.0}
    jobs.close()


def test_a_rank_that_never_edits_costs_all_their_edit() -> None:
    jobs = started(0, 1, 2, 3, limit_s=SHORT_S)
    jobs.everybody.change((WorkerId(0), WorkerId(3), WorkerId(2)))
    late = jobs.group(WorkerId(2))
    late.close()
    jobs.all(lambda group: group.rearm())
    assert jobs.swap() == {False}
    assert jobs.swap() == {True}
    assert jobs.sums() == {3.0}
    assert jobs.libraries[WorkerId(0)].calls == ["revoke", "shrink", "abort", "abort", "init"]
    jobs.close()


class Plain:
    """A native communicator that cannot be edited."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def all_reduce(self, tensor: Tensor) -> torch.futures.Future[list[Tensor]]:
        raise AssertionError("not asked for here")

    def abort(self) -> None:
        self.ended.set()


def test_what_cannot_be_edited_is_aborted() -> None:
    made: list[Plain] = []

    def make(name: str, rank: int, size: int) -> Plain:
        made.append(Plain())
        return made[-1]

    group = HybridGroup(StandIn(Everybody((WorkerId(0),)), WorkerId(0)), make, "job")  # type: ignore[arg-type]
    group.rearm()
    assert group.built(time.monotonic() + LIMIT_S)
    assert group.boundary()
    group.rearm()
    assert made[0].ended.wait(LIMIT_S)
    assert group.built(time.monotonic() + LIMIT_S)
    group.close()
    assert made[1].ended.wait(LIMIT_S)


def test_ranks_that_give_an_edit_up_build_of_the_members_that_voted() -> None:
    jobs = started(0, 1, 2, limit_s=SHORT_S)
    jobs.everybody.change((WorkerId(0), WorkerId(1)))
    jobs.group(WorkerId(1)).close()
    jobs.all(lambda group: group.rearm())
    jobs.all(lambda group: group.built(time.monotonic() + LIMIT_S))
    first = jobs.groups[WorkerId(0)]._group
    assert isinstance(first, StandIn)
    first.after_vote = lambda: jobs.everybody.change((WorkerId(0),))  # the links tell of it right then
    voters = [jobs.groups[WorkerId(me)] for me in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        votes = [pool.submit(group.boundary) for group in voters]
        assert [vote.result(LIMIT_S) for vote in votes] == [False, False]
    assert [group.built(time.monotonic() + LIMIT_S) for group in voters] == [True, True]
    jobs.close()
