"""All-reduces over a grid of native communicators, which go on round a loss without making any: core/grid_sum.py."""

import time
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from elaswave.comm.group import Group, flat_of
from elaswave.comm.native import Build, NativeCommunicator, NativeFactory, sum_natively
from elaswave.comm.operators import combine_of
from elaswave.core.grid_sum import GridOperation, GroupSum, HandOver, Tell, grid_sum
from elaswave.core.ids import WorkerId
from elaswave.core.native_groups import grid_rows
from elaswave.errors import PeerError

DTYPES: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64)
"""What can be summed."""

MESSAGE_TAG: Final = 1 << 30
"""Of what is handed over and told, beside the messages of whoever uses the group."""

_DTYPE_BITS, _ELEMENT_BITS = 3, 36


class GridGroup:
    """Sums over all ranks of an elastic group by native communicators of its rows and columns. For one thread.

    After a loss the rows and columns that are whole are used on, and links carry what has to get round the others.
    Results are tentative until `boundary`, as those of HybridGroup. After EpochChanged: `reconfigure()` of the process
    group, `resume()`, and the step again; `arm()` at leisure, to have a grid of who is there.
    """

    def __init__(self, group: Group, factory: NativeFactory, name: str) -> None:
        self._group = group
        self._factory = factory
        self._name = name
        self._grid: list[tuple[WorkerId, ...]] = []
        self._lines: dict[tuple[WorkerId, ...], Build] = {}
        self._natives: dict[tuple[WorkerId, ...], NativeCommunicator] = {}
        self._last: dict[tuple[WorkerId, ...], tuple[int, int, int]] = {}  # operations, and elements, dtype of the last
        self._ready = False
        self._epoch = self._attempt = -1

    @property
    def is_native(self) -> bool:
        """Whether all-reduces go over the grid now."""
        return self._ready and self._operations() is not None

    def arm(self) -> None:
        """Build a grid of the members as they are now, behind the training; every rank calls it."""
        self.close()
        communicator = self._group.communicator
        try:
            epoch, members = self._group.endpoint.membership(communicator)
        except PeerError:
            return  # the next operation raises it too, and then this is called again
        width = len(members) // grid_rows(len(members))
        self._grid = [tuple(members[start : start + width]) for start in range(0, len(members), width)]
        self._epoch, self._attempt = epoch, self._attempt + 1 if epoch == self._epoch else 0
        for number, line in enumerate(self._all_lines()):
            if communicator.me in line:
                name = f"{self._name}/{epoch}/{self._attempt}/{number}"
                self._lines[line] = self._build(name, line)

    def _build(self, name: str, line: tuple[WorkerId, ...]) -> Build:
        rank = line.index(self._group.communicator.me)
        return Build(lambda _: self._factory(name, rank, len(line)), name, is_edit=False)

    def _all_lines(self) -> list[tuple[WorkerId, ...]]:
        lines = [*self._grid, *zip(*self._grid, strict=True)]
        return [line for line in lines if len(line) > 1]

    def built(self, deadline: float) -> bool:
        """Wait for this rank's row and column; whether they are there."""
        return all(build.wait(deadline) for build in self._lines.values())

    def close(self) -> None:
        """Drop the grid for good. The elastic group stays."""
        for build in self._lines.values():
            build.abandon()
        self._lines, self._natives, self._last, self._grid = {}, {}, {}, []
        self._ready = False

    def boundary(self) -> bool:
        """End of a step: all ranks have all results of it, or EpochChanged on all. Whether the next one is native."""
        built = bool(self._grid) and all(build.made is not None for build in self._lines.values())
        vote = torch.tensor([int(built)])
        minimum = combine_of(dist.ReduceOp.MIN, vote.dtype)
        self._group.endpoint.wait(self._group.all_reduce(vote, minimum))
        if vote.item() and not self._ready:
            self._ready = True
            self._natives = {line: build.made for line, build in self._lines.items() if build.made is not None}
        return self.is_native

    def all_reduce(self, tensor: Tensor) -> None:
        """`tensor`, of one of DTYPES, becomes the sum over all ranks; tentative until the next `boundary`."""
        operations = self._operations() if self._ready else None
        if operations is None:
            self._group.endpoint.wait(self._group.all_reduce(tensor))
            return
        # What a broken operation writes late must not reach the caller's memory, which is used anew by then.
        held = flat_of(tensor).clone()
        for operation in operations:
            held = self._run(operation, held)
        tensor.copy_(held.view(tensor.shape))

    def resume(self) -> None:
        """After a loss: bring the lines that are whole to the same operation. Raises EpochChanged at another one.

        Some ranks of such a line may have begun an operation that the others, who knew of the loss, never did.
        """
        if not self._ready:
            return
        lines = self._all_lines()
        counts = torch.tensor([_packed(*self._last.get(line, (0, 0, 0))) for line in lines])
        maximum = combine_of(dist.ReduceOp.MAX, counts.dtype)
        self._group.endpoint.wait(self._group.all_reduce(counts, maximum))
        here = set(self._group.communicator.members)
        for line, packed in zip(lines, counts.tolist(), strict=True):
            operations, elements, dtype = _unpacked(packed)
            if line in self._natives and here.issuperset(line) and self._last.get(line, (0, 0, 0))[0] < operations:
                self._sum(line, torch.zeros(elements, dtype=DTYPES[dtype]))

    def _operations(self) -> tuple[GridOperation, ...] | None:
        here, before = set(self._group.communicator.members), {worker for row in self._grid for worker in row}
        return grid_sum(self._grid, before - here) if here <= before else None

    def _run(self, operation: GridOperation, held: Tensor) -> Tensor:
        me = self._group.communicator.me
        match operation:
            case HandOver(source=source, target=target):
                if me == source:
                    self._send(target, held)
                    return torch.zeros_like(held)
                return held + self._received(source, held) if me == target else held
            case Tell(source=source, target=target):
                if me == source:
                    self._send(target, held)
                return self._received(source, held) if me == target else held
            case GroupSum(members=members):
                return self._sum(members, held) if me in members else held

    def _sum(self, line: tuple[WorkerId, ...], held: Tensor) -> Tensor:
        operations, _, _ = self._last.get(line, (0, 0, 0))
        self._last[line] = operations + 1, held.numel(), DTYPES.index(held.dtype)
        total = held.clone()
        sum_natively(self._group, self._natives[line], total)
        return total

    def _send(self, target: WorkerId, held: Tensor) -> None:
        communicator = self._group.communicator
        self._group.endpoint.send(communicator, communicator.members.index(target), MESSAGE_TAG, held)

    def _received(self, source: WorkerId, like: Tensor) -> Tensor:
        communicator, endpoint = self._group.communicator, self._group.endpoint
        found = torch.empty_like(like)
        awaited = endpoint.expect(communicator, communicator.members.index(source), MESSAGE_TAG)
        endpoint.receive(communicator, awaited, found, time.monotonic() + self._group.timeout_s)
        return found


def _packed(operations: int, elements: int, dtype: int) -> int:
    """Greater for more operations."""
    return (operations << _ELEMENT_BITS | elements) << _DTYPE_BITS | dtype


def _unpacked(packed: int) -> tuple[int, int, int]:
    rest, dtype = packed >> _DTYPE_BITS, packed & (1 << _DTYPE_BITS) - 1
    return rest >> _ELEMENT_BITS, rest & (1 << _ELEMENT_BITS) - 1, dtype
