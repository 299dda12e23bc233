"""Collectives made of others: what the choice by size, roots and acknowledgement add."""

from collections.abc import Sequence

import torch
from torch import Tensor

from elaswave.comm.collectives.commands import NO_ANSWER, Collective, Held, Receive, Send
from elaswave.comm.collectives.reduction import Combine
from elaswave.comm.collectives.tree import tree_barrier, tree_broadcast, tree_reduce

_NOTHING = torch.empty(0)


def placed(collective: Collective, ranks: Sequence[int]) -> Collective:
    """The same among some ranks, or in another order of them: rank r of the collective is `ranks[r]`."""
    answer = NO_ANSWER
    while True:
        try:
            command = collective.send(answer)
        except StopIteration:
            return
        match command:
            case Send():
                answer = yield Send(ranks[command.rank], command.tensor)
            case Receive():
                answer = yield Receive(ranks[command.rank], command.like)
            case _:
                answer = yield command


def rotated(collective: Collective, shift: int, size: int) -> Collective:
    """The same with rank r in the part of rank r - shift: a root other than 0."""
    yield from placed(collective, [(rank + shift) % size for rank in range(size)])


def broadcast(rank: int, size: int, root: int, tensor: Tensor) -> Collective:
    """Every rank gets the tensor of the root, after everybody has entered."""
    turned = (rank - root) % size
    yield from rotated(tree_reduce(turned, size, tensor[:0], _ignore), root, size)
    yield from rotated(tree_broadcast(turned, size, tensor), root, size)


def reduce(rank: int, size: int, root: int, tensor: Tensor, combine: Combine) -> Collective:
    """The root gets the combination over all ranks; elsewhere `tensor` holds that of a part afterwards."""
    yield from rotated(tree_reduce((rank - root) % size, size, tensor, combine), root, size)


def acknowledged(rank: int, size: int, collective: Collective) -> Collective:
    """After it nobody can lack its result any more: everybody has said to hold it."""
    yield from collective
    yield Held()
    yield from tree_barrier(rank, size, _NOTHING)


def chained(collectives: Sequence[Collective]) -> Collective:
    """One after the other."""
    for collective in collectives:
        yield from collective


def _ignore(into: Tensor, other: Tensor) -> None:
    del into, other
