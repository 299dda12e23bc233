"""Programs of a step: complete, free of deadlock without any buffer, within their memory, as short as 1F1B."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_strategies import Losses, grid, losses

from elaswave.core.ids import Epoch, Layer, MicroBatch, WorkerId
from elaswave.core.layout import partition_layers
from elaswave.core.plan import Hop, Route
from elaswave.core.routes import balanced_routes
from elaswave.core.schedule import Instruction, Kind, Program, find_deadlock, in_flight_caps, make_schedule

COMPUTE = (Kind.FORWARD, Kind.BACKWARD)
Value = tuple[str, MicroBatch, Layer]
"""An activation or a gradient at a cut, or "done": the forward pass of the hop that begins there."""


class Replay:
    """Runs programs by what each worker holds: an own statement of what an instruction needs and makes."""

    def __init__(self, programs: Mapping[WorkerId, Program], layers: int) -> None:
        self.todo = {worker: list(program) for worker, program in programs.items()}
        self.held: dict[WorkerId, set[Value]] = {worker: set() for worker in programs}
        self.layers = layers

    def run(self) -> dict[WorkerId, list[Instruction]]:
        """What is left when nothing can go on."""
        while any([self._compute(worker) for worker in self.todo]) or self._meet():
            pass
        return {worker: todo for worker, todo in self.todo.items() if todo}

    def _compute(self, worker: WorkerId) -> bool:
        todo, held = self.todo[worker], self.held[worker]
        if not todo or todo[0].kind not in COMPUTE:
            return False
        now = todo.pop(0)
        number, hop = now.micro_batch, now.hop
        assert hop.worker == worker
        if now.kind is Kind.FORWARD:
            assert hop.first == 0 or ("activation", number, hop.first) in held
            held |= {("done", number, hop.first), ("activation", number, hop.last)}
        else:
            assert ("done", number, hop.first) in held
            assert hop.last == self.layers or ("gradient", number, hop.last) in held
            held.add(("gradient", number, hop.first))
        return True

    def _meet(self) -> bool:
        """A sender and a receiver that both are at the same transfer go on together."""
        for sender, todo in self.todo.items():
            if not todo or todo[0].kind is not Kind.SEND:
                continue
            send = todo[0]
            assert send.peer is not None
            facing = self.todo[send.peer][:1]
            if facing and _faces(sender, send, facing[0]):
                value = ("gradient" if send.backward else "activation", send.micro_batch, send.cut)
                assert value in self.held[sender]
                assert value not in self.held[send.peer]
                self.held[send.peer].add(value)
                todo.pop(0)
                self.todo[send.peer].pop(0)
                return True
        return False


def _faces(sender: WorkerId, send: Instruction, other: Instruction) -> bool:
    same = (send.micro_batch, send.cut, send.backward) == (other.micro_batch, other.cut, other.backward)
    return other.kind is Kind.RECEIVE and other.peer == sender and same


def naive_caps(routes: Sequence[Route]) -> dict[tuple[WorkerId, int], int]:
    """1F1B: as many as there are stages from here on, times the pipelines that a worker stands for."""
    depth = len(routes[0])
    hosts = [{route[position].worker for route in routes} for position in range(depth)]
    most = max(len(found) for found in hosts)
    return {
        (worker, position): max(1, ceil(Fraction((depth - position) * most, len(hosts[position]))))
        for position in range(depth)
        for worker in hosts[position]
    }


@given(losses())
@settings(max_examples=80)
def test_every_hop_runs_once_each_way_on_its_worker(case: Losses) -> None:
    programs = make_schedule(case.after).programs
    for kind in COMPUTE:
        ran = [(worker, i.micro_batch, i.hop) for worker, p in programs.items() for i in p if i.kind is kind]
        wanted = [(hop.worker, MicroBatch(index), hop) for index, route in enumerate(case.after) for hop in route]
        assert sorted(ran, key=repr) == sorted(wanted, key=repr)
    assert not case.lost & set(programs)


@given(losses())
@settings(max_examples=100)
def test_programs_end_without_buffers_and_every_value_is_there_in_time(case: Losses) -> None:
    programs = make_schedule(case.after).programs
    assert Replay(programs, case.layers).run() == {}
    assert find_deadlock(programs) is None


@given(losses())
@settings(max_examples=80)
def test_transfers_are_those_between_different_workers(case: Losses) -> None:
    programs = make_schedule(case.after).programs
    sends = [i for program in programs.values() for i in program if i.kind is Kind.SEND]
    edges = sum(a.worker != b.worker for route in case.after for a, b in pairwise(route))
    assert len(sends) == 2 * edges
    assert all(i.peer != i.hop.worker for i in sends)


@given(losses())
@settings(max_examples=80)
def test_no_more_micro_batches_in_flight_than_the_caps_allow(case: Losses) -> None:
    caps = naive_caps(case.after)
    assert in_flight_caps(case.after) == caps
    for worker, program in make_schedule(case.after).programs.items():
        for position in range(len(case.stages)):
            flying = 0
            for now in (i for i in program if case.after[i.micro_batch].index(i.hop) == position):
                flying += {Kind.FORWARD: 1, Kind.BACKWARD: -1}.get(now.kind, 0)
                assert flying <= caps[(worker, position)]
            assert flying == 0


@given(losses())
@settings(max_examples=60)
def test_the_same_routes_give_the_same_programs(case: Losses) -> None:
    assert make_schedule(case.after) == make_schedule(tuple(case.after))


@pytest.mark.parametrize("dp", [1, 2, 3, 4])
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("each", [1, 2, 3, 4, 7])
def test_rectangular_layouts_take_as_long_as_1f1b(dp: int, pp: int, each: int) -> None:
    routes = balanced_routes(partition_layers(pp, pp), grid(dp, pp), dp * each, Epoch(1))
    assert make_schedule(routes).makespan == 3 * (each + pp - 1)


A, B = WorkerId(0), WorkerId(1)
LOW = Hop(worker=A, epoch=Epoch(1), first=Layer(0), last=Layer(1))
HIGH = Hop(worker=B, epoch=Epoch(1), first=Layer(1), last=Layer(2))


def transfer(number: int, *, backward: bool = False) -> tuple[Instruction, Instruction]:
    """Send and receive at the cut between LOW and HIGH."""
    source, target = (HIGH, LOW) if backward else (LOW, HIGH)
    micro_batch, cut = MicroBatch(number), Layer(1)
    return (
        Instruction(Kind.SEND, micro_batch, source, backward, cut, target.worker),
        Instruction(Kind.RECEIVE, micro_batch, target, backward, cut, source.worker),
    )


def test_two_workers_that_both_send_first_block_each_other() -> None:
    send, receive = transfer(0)
    send_back, receive_back = transfer(1, backward=True)
    facing = {A: (send, receive_back), B: (send_back, receive)}
    assert "worker 0" in (find_deadlock(facing) or "")
    assert "worker 1" in (find_deadlock(facing) or "")
    assert len(Replay(facing, 2).run()) == 2
    assert find_deadlock({A: (send, receive_back), B: (receive, send_back)}) is None
    assert find_deadlock({A: (receive_back, send), B: (send_back, receive)}) is None


def test_transfers_in_different_orders_block_each_other() -> None:
    (send, receive), (next_send, next_receive) = transfer(0), transfer(1)
    assert find_deadlock({A: (send, next_send), B: (receive, next_receive)}) is None
    assert find_deadlock({A: (send, next_send), B: (next_receive, receive)}) is not None
    assert find_deadlock({A: (send,), B: ()}) is not None
    assert find_deadlock({A: (), B: (receive,)}) is not None


@given(losses().filter(lambda case: len(case.stages) > 1), st.data())
@settings(max_examples=60)
def test_a_program_without_one_of_its_transfers_is_found_to_block(case: Losses, data: st.DataObject) -> None:
    programs = dict(make_schedule(case.after).programs)
    places = [(w, at) for w, p in programs.items() for at, i in enumerate(p) if i.kind not in COMPUTE]
    if not places:
        return
    worker, at = data.draw(st.sampled_from(places))
    programs[worker] = programs[worker][:at] + programs[worker][at + 1 :]
    assert find_deadlock(programs) is not None
