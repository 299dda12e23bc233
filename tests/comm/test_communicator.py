"""Agreement after losses: an operation succeeds on all survivors or fails on all, in random walks."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elaswave.comm.collectives.commands import Collective, Receive
from elaswave.comm.collectives.composed import acknowledged
from elaswave.comm.collectives.grid import grid_all_reduce, halved_all_reduce
from elaswave.comm.collectives.reduction import add
from elaswave.comm.collectives.tree import FAN_OUT, parent_of, tree_all_reduce
from elaswave.comm.communicator import AGREEMENT, NO_STAKE, without
from elaswave.comm.operation import Operation
from elaswave.core.ids import WorkerId
from elaswave.errors import EpochChanged, ProtocolError
from tests.comm.simulated import Network

LENGTH = 7


def small(rank: int, size: int, tensor: Tensor) -> Collective:
    return tree_all_reduce(rank, size, tensor, add)


def middle(rank: int, size: int, tensor: Tensor) -> Collective:
    return halved_all_reduce(rank, size, tensor, add)


def large(rank: int, size: int, tensor: Tensor) -> Collective:
    return acknowledged(rank, size, grid_all_reduce(rank, size, tensor, add))


class Walk:
    """Ranks that add up numbers again and again, some of which die; each keeps what its operations have given."""

    def __init__(self, seed: int) -> None:
        self.generator = random.Random(seed)
        size = self.generator.randint(2, 7)
        self.network = Network(size, self.generator)
        self.make, self.keep = self.generator.choice(((small, True), (middle, True), (large, False)))
        self.results: dict[WorkerId, list[float]] = {worker: [] for worker in self.network.alive}
        self.current: dict[WorkerId, tuple[Operation, Tensor]] = {}
        self.gone: list[WorkerId] = []
        self.epoch = 0
        self.told = dict.fromkeys(self.network.alive, 0)
        self.raised: dict[WorkerId, list[int]] = {worker: [] for worker in self.network.alive}

    def step(self) -> None:
        choice = self.generator.random()
        if choice < 0.04 and len(self.network.alive) > 1:
            worker = self.generator.choice(sorted(self.network.alive))
            self.network.kill(worker)
            self.gone.append(worker)
            self.epoch += 1
        elif choice < 0.2:
            self._tell(self.generator.choice(sorted(self.network.alive)))
        elif choice < 0.45:
            self._work(self.generator.choice(sorted(self.network.alive)))
        else:
            self._deliver()

    def _deliver(self) -> None:
        """Something arrives somewhere."""
        self.network.deliver_one()

    def _tell(self, worker: WorkerId) -> None:
        if self.told[worker] < self.epoch:
            self.told[worker] = self.epoch
            self.network.edit(worker, self.epoch, self.gone)

    def _work(self, worker: WorkerId) -> None:
        communicator = self.network.ranks[worker]
        if worker in self.current:
            operation, tensor = self.current[worker]
            if not operation.finished:
                return
            del self.current[worker]
            if operation.error is None:
                assert torch.equal(tensor, tensor[:1].expand(len(tensor)))
                assert tensor[0] % (len(self.results[worker]) + 1) == 0, "numbers of another operation are in it"
                self.results[worker].append(float(tensor[0]))
            else:
                assert isinstance(operation.error, EpochChanged)
                self.raised[worker].append(len(self.results[worker]))
        elif communicator.broken and not communicator.agreed and self.generator.random() < 0.5:
            communicator.acknowledge()  # its user has heard of the edit elsewhere
            self._start(worker)
        elif communicator.broken and communicator.agreed and self.told[worker] == self.epoch:
            if self.raised[worker] and self.raised[worker][-1] == len(self.results[worker]):
                communicator.acknowledge()
            self._start(worker)
        else:
            self._start(worker)

    def _start(self, worker: WorkerId) -> None:
        tensor = torch.full((LENGTH,), 1.0 + len(self.results[worker]))
        self.current[worker] = (self.network.start(worker, self.make, tensor, keep=self.keep), tensor)

    def finish(self) -> None:
        """Everybody hears of everything and works until as much has succeeded as anywhere, and a bit more."""
        for worker in sorted(self.network.alive):
            self._tell(worker)
        goal = max(len(found) for found in self.results.values()) + 3
        for _ in range(20000):
            behind = [worker for worker in sorted(self.network.alive) if len(self.results[worker]) < goal]
            if not behind:
                return
            self._work(self.generator.choice(behind))
            self._deliver()
        raise AssertionError(f"stuck: {self.results}, {self.raised}")

    def check(self) -> int:
        """All survivors have the same results as far as they have come; returns how many were lost."""
        found = [self.results[worker] for worker in sorted(self.network.alive)]
        shortest = min(map(len, found))
        assert all(results[:shortest] == found[0][:shortest] for results in found), self.results
        return self.epoch


@pytest.mark.parametrize("base", range(0, 400, 100))
def test_operations_succeed_on_all_survivors_or_on_none(base: int) -> None:
    losses = 0
    for seed in range(base, base + 100):
        walk = Walk(seed)
        for _ in range(150):
            walk.step()
        walk.finish()
        losses += walk.check()
    assert losses > 50, "too few losses to show anything"


def test_what_a_rank_has_completed_is_handed_to_those_that_miss_it() -> None:
    network = Network(3, random.Random(0))
    tensors = [torch.ones(LENGTH) for _ in range(3)]
    operations = [network.start(WorkerId(rank), small, tensors[rank], keep=True) for rank in range(3)]
    while not operations[0].finished:  # the root has the sum; its children have not heard of it
        for pair in ((1, 0), (2, 0)):
            frames = network.links[WorkerId(pair[0]), WorkerId(pair[1])]
            epoch, number, content = frames.popleft()
            network.ranks[WorkerId(0)].receive(WorkerId(pair[0]), epoch, number, content.numpy())
    network.kill(WorkerId(2))
    network.links.clear()
    for rank in (0, 1):
        network.edit(WorkerId(rank), 1, [WorkerId(2)])
    network.run()
    assert operations[1].finished and operations[1].error is None
    assert float(tensors[1][0]) == 3.0


def test_members_that_leave_are_replaced_by_the_last() -> None:
    members = tuple(WorkerId(worker) for worker in range(6))
    assert without(members, [WorkerId(1)]) == (0, 5, 2, 3, 4)
    assert without(members, [WorkerId(5)]) == (0, 1, 2, 3, 4)
    assert without(members, [WorkerId(0), WorkerId(5)]) == (4, 1, 2, 3)


@given(st.integers(2, 200), st.data())
def test_a_removed_member_costs_a_tree_four_links_at_most(size: int, data: st.DataObject) -> None:
    members = tuple(WorkerId(worker) for worker in range(size))
    gone = data.draw(st.sampled_from(members))
    made = links_of(without(members, [gone])) - links_of(members)
    assert len(made) <= FAN_OUT + 1
    assert not any(gone in link for link in made)


def links_of(members: tuple[WorkerId, ...]) -> set[frozenset[WorkerId]]:
    """Of a tree of these members."""
    return {frozenset((members[rank], members[parent_of(rank)])) for rank in range(1, len(members))}


def test_an_operation_of_another_length_is_an_error_that_names_both() -> None:
    network = Network(2, random.Random(0))
    network.start(WorkerId(1), small, torch.ones(3), keep=True)
    operation = network.start(WorkerId(0), small, torch.ones(LENGTH), keep=True)
    network.run()
    assert operation.finished
    with pytest.raises(ProtocolError, match=r"12 bytes .* expects 28"):
        operation.raise_error()


def test_any_number_of_operations_that_wait_end_at_once() -> None:
    """All but the first have what they need already: they must not end inside one another."""
    count = 2000
    network = Network(3, random.Random(0))
    me = network.ranks[WorkerId(0)]

    def receive(source: int) -> Collective:
        yield Receive(source, torch.zeros(1))

    operations = [Operation("test", receive(1 if index == 0 else 2), 1e9, None, keep=False) for index in range(count)]
    for operation in operations:
        me.submit(operation)
    content = torch.zeros(1).view(torch.uint8).numpy()
    for number in range(2, count + 1):
        me.receive(WorkerId(2), 0, number, content)
    assert not any(operation.finished for operation in operations)
    me.receive(WorkerId(1), 0, 1, content)
    assert all(operation.finished and operation.error is None for operation in operations)
    assert me.finished == operations, "in their order"


@pytest.mark.parametrize("length", [-1, 0, 3, 1 << 60])
def test_a_result_that_is_handed_over_has_the_expected_length(length: int) -> None:
    """Rank 0 has missed the last operation; the holder claims a length of its own."""
    network = Network(2, random.Random(0))
    me, tensor = network.ranks[WorkerId(0)], torch.ones(LENGTH)
    operation = network.start(WorkerId(0), small, tensor, keep=True)
    me.edit(1, (), (), 0.0)

    completed, holder = 1, 1
    said = torch.tensor([completed, holder, length, completed, 1, NO_STAKE])
    me.receive(WorkerId(1), 1, AGREEMENT, said.view(torch.uint8).numpy())
    assert isinstance(operation.error, ProtocolError)
    assert f"hands over a result of {length} bytes" in str(operation.error)
