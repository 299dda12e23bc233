"""Programs of one step: list scheduling under a memory cap, with one total order of all work and communication.

Every transfer has a place in one global order, behind the work that makes the value and before the work that needs it;
each worker's program is the restriction of that order to what it takes part in. So the first instruction of the order
that is not done yet can always be done, even if no transfer is buffered: that is what ordered transports (NCCL) need.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from elaswave.core.ids import Layer, MicroBatch, WorkerId
from elaswave.core.plan import Hop, Route
from elaswave.errors import InvariantError


class Kind(Enum):
    """What an instruction does. Values sort nothing; order comes from the schedule."""

    FORWARD = "forward"
    BACKWARD = "backward"
    SEND = "send"
    RECEIVE = "receive"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One entry of a program.

    FORWARD, BACKWARD: run `hop`. SEND, RECEIVE: the activation (or gradient, where `backward`) at the edge of `hop`,
    which is this worker's hop, with `peer` at the other end and `cut` as the edge.
    """

    kind: Kind
    micro_batch: MicroBatch
    hop: Hop
    backward: bool = False
    cut: Layer = Layer(0)
    peer: WorkerId | None = None


Program = tuple[Instruction, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Time of a layer's forward and backward pass, in any unit; equal for all layers."""

    forward: float = 1.0
    backward: float = 2.0


def in_flight_caps(routes: Sequence[Route], slack: float = 1.0) -> dict[tuple[WorkerId, int], int]:
    """Micro-batches that a worker may have between forward and backward, by position in the route, as in 1F1B.

    A worker that serves more micro-batches than its peers in the fault-free layout gets a proportionally higher cap.
    """
    served: dict[tuple[WorkerId, int], int] = {}
    workers: dict[int, set[WorkerId]] = {}
    for route in routes:
        for position, hop in enumerate(route):
            served[(hop.worker, position)] = served.get((hop.worker, position), 0) + 1
            workers.setdefault(position, set()).add(hop.worker)
    depth = max((len(route) for route in routes), default=0)
    pipelines = max((len(found) for found in workers.values()), default=1)
    caps: dict[tuple[WorkerId, int], int] = {}
    for worker, position in served:
        share = (depth - position) * pipelines * slack / len(workers[position])
        caps[(worker, position)] = max(1, -(-int(share * 1000) // 1000))
    return caps


class _Scheduler:
    """Event simulation: a free worker takes its oldest ready backward, else its oldest forward under the cap."""

    def __init__(self, routes: Sequence[Route], costs: Costs, caps: Mapping[tuple[WorkerId, int], int]) -> None:
        self.routes = routes
        self.costs = costs
        self.caps = caps
        self.in_flight: dict[tuple[WorkerId, int], int] = dict.fromkeys(caps, 0)
        self.forwards: dict[WorkerId, list[tuple[int, int]]] = {}
        self.backwards: dict[WorkerId, list[tuple[int, int]]] = {}
        self.running: list[tuple[float, int, WorkerId, int, int, bool]] = []
        self.free: set[WorkerId] = {worker for worker, _ in caps}
        self.programs: dict[WorkerId, list[Instruction]] = {worker: [] for worker in sorted(self.free)}
        self.sequence = 0
        self.time = 0.0
        for worker in self.programs:
            self.forwards[worker] = []
            self.backwards[worker] = []
        for micro_batch, route in enumerate(routes):
            heapq.heappush(self.forwards[route[0].worker], (micro_batch, 0))

    def run(self) -> float:
        """Fill the programs; the time of the last end."""
        self._start_free()
        while self.running:
            self.time = self.running[0][0]
            while self.running and self.running[0][0] <= self.time:
                _, _, worker, micro_batch, position, backward = heapq.heappop(self.running)
                self._finish(worker, micro_batch, position, backward)
            self._start_free()
        return self.time

    def _start_free(self) -> None:
        for worker in sorted(self.free):
            chosen = self._choose(worker)
            if chosen is None:
                continue
            micro_batch, position, backward = chosen
            hop = self.routes[micro_batch][position]
            kind = Kind.BACKWARD if backward else Kind.FORWARD
            self.programs[worker].append(Instruction(kind, MicroBatch(micro_batch), hop, backward))
            cost = (self.costs.backward if backward else self.costs.forward) * (hop.last - hop.first)
            self.sequence += 1
            heapq.heappush(self.running, (self.time + cost, self.sequence, worker, micro_batch, position, backward))
            self.free.discard(worker)

    def _choose(self, worker: WorkerId) -> tuple[int, int, bool] | None:
        if self.backwards[worker]:
            return (*heapq.heappop(self.backwards[worker]), True)
        held: list[tuple[int, int]] = []
        found: tuple[int, int, bool] | None = None
        while self.forwards[worker] and found is None:
            micro_batch, position = heapq.heappop(self.forwards[worker])
            if self.in_flight[(worker, position)] < self.caps[(worker, position)]:
                self.in_flight[(worker, position)] += 1
                found = (micro_batch, position, False)
            else:
                held.append((micro_batch, position))
        for item in held:
            heapq.heappush(self.forwards[worker], item)
        return found

    def _finish(self, worker: WorkerId, micro_batch: int, position: int, backward: bool) -> None:
        route = self.routes[micro_batch]
        self.free.add(worker)
        if not backward:
            if position + 1 == len(route):
                heapq.heappush(self.backwards[worker], (micro_batch, position))
            else:
                self._transfer(micro_batch, position, position + 1, backward=False)
                heapq.heappush(self.forwards[route[position + 1].worker], (micro_batch, position + 1))
            return
        self.in_flight[(worker, position)] -= 1
        if position > 0:
            self._transfer(micro_batch, position, position - 1, backward=True)
            heapq.heappush(self.backwards[route[position - 1].worker], (micro_batch, position - 1))

    def _transfer(self, micro_batch: int, source: int, target: int, *, backward: bool) -> None:
        route = self.routes[micro_batch]
        sender, receiver = route[source], route[target]
        if sender.worker == receiver.worker:
            return
        cut = sender.first if backward else sender.last
        number = MicroBatch(micro_batch)
        send = Instruction(Kind.SEND, number, sender, backward, cut, receiver.worker)
        receive = Instruction(Kind.RECEIVE, number, receiver, backward, cut, sender.worker)
        self.programs[sender.worker].append(send)
        self.programs[receiver.worker].append(receive)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Programs of all workers and the time that they take together, in the unit of the costs."""

    programs: Mapping[WorkerId, Program]
    makespan: float


def make_schedule(routes: Sequence[Route], costs: Costs | None = None, slack: float = 1.0) -> Schedule:
    """List-schedule one step. A pure function of its arguments; O(hops x log hops)."""
    scheduler = _Scheduler(routes, costs or Costs(), in_flight_caps(routes, slack))
    makespan = scheduler.run()
    programs = {worker: tuple(program) for worker, program in scheduler.programs.items()}
    done = sum(instruction.kind in (Kind.FORWARD, Kind.BACKWARD) for p in programs.values() for instruction in p)
    if done != 2 * sum(len(route) for route in routes):
        raise InvariantError(f"the schedule holds {done} of {2 * sum(len(r) for r in routes)} instructions")
    return Schedule(programs=programs, makespan=makespan)


def find_deadlock(programs: Mapping[WorkerId, Program]) -> str | None:
    """Run the programs with rendezvous transfers and zero buffers; what blocks them, or None if all of them end."""
    position = dict.fromkeys(programs, 0)

    moved = True
    while moved:
        moved = False
        for worker in sorted(programs):
            while position[worker] < len(programs[worker]) and _step(programs, position, worker):
                moved = True
    stuck = {w: programs[w][at] for w, at in position.items() if at < len(programs[w])}
    if not stuck:
        return None
    return "; ".join(f"worker {worker} at {what}" for worker, what in sorted(stuck.items()))


def _step(
    programs: Mapping[WorkerId, Program],
    position: dict[WorkerId, int],
    worker: WorkerId,
) -> bool:
    instruction = programs[worker][position[worker]]
    edge = (instruction.micro_batch, instruction.cut, instruction.backward)
    if instruction.kind in (Kind.FORWARD, Kind.BACKWARD):
        position[worker] += 1
        return True
    peer = instruction.peer
    if peer is None or position[peer] >= len(programs[peer]):
        return False
    other = programs[peer][position[peer]]
    wanted = Kind.RECEIVE if instruction.kind is Kind.SEND else Kind.SEND
    if other.kind is not wanted or (other.micro_batch, other.cut, other.backward) != edge or other.peer != worker:
        return False
    position[worker] += 1
    position[peer] += 1
    return True
