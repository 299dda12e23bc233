"""Collectives against naive oracles, all ranks in one process, frames in any order."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elaswave.comm.collectives import shared_memory
from elaswave.comm.collectives.commands import Collective
from elaswave.comm.collectives.composed import acknowledged, broadcast, reduce
from elaswave.comm.collectives.direct import (
    direct_all_gather,
    direct_exchange,
    direct_gather,
    direct_reduce_scatter,
    direct_scatter,
)
from elaswave.comm.collectives.reduction import add, even_segments, maximum, split
from elaswave.comm.collectives.ring import ring_all_gather, ring_all_reduce, ring_reduce_scatter
from elaswave.comm.collectives.shared_memory import (
    HEADER_BYTES,
    Arenas,
    shared_all_gather,
    shared_all_reduce,
    shared_catch_up,
    shared_reduce_scatter,
)
from elaswave.comm.collectives.tree import tree_all_reduce, tree_barrier
from elaswave.core.ids import WorkerId
from tests.comm.simulated import Network

sizes = st.integers(1, 9)
seeds = st.integers(0, 1 << 20)
lengths = st.integers(0, 40)


def values(rank: int, length: int) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def run(seed: int, collectives: list[Collective]) -> None:
    """Run them, the one of rank r at place r, to their ends."""
    network = Network(len(collectives), random.Random(seed))
    order = list(range(len(collectives)))
    random.Random(seed).shuffle(order)
    operations = []
    for rank in order:
        made = collectives[rank]
        operations.append(network.start(WorkerId(rank), lambda r, s, t, made=made: made, torch.empty(0), keep=False))
        if seed % 2:
            network.deliver_one()
    network.run()
    assert all(operation.finished and operation.error is None for operation in operations)


@given(sizes, lengths, seeds, st.booleans())
@settings(deadline=None, max_examples=60)
def test_all_reduce_gives_the_sum_and_the_same_bits_on_all_ranks(size: int, length: int, seed: int, tree: bool) -> None:
    tensors = [values(rank, length) for rank in range(size)]
    expected = sum(tensors, torch.zeros(length, dtype=torch.float64))

    def make(rank: int) -> Collective:
        if tree:
            return tree_all_reduce(rank, size, tensors[rank], add)
        return acknowledged(rank, size, ring_all_reduce(rank, split(tensors[rank], even_segments(length, size)), add))

    run(seed, [make(rank) for rank in range(size)])
    assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)
    torch.testing.assert_close(tensors[0], expected)
    again = [values(rank, length) for rank in range(size)]
    first, tensors[:] = tensors[0].clone(), again
    run(seed + 12345, [make(rank) for rank in range(size)])
    assert torch.equal(tensors[0], first), "the bits depend on the order of arrival"


@given(st.lists(st.integers(0, 12), min_size=1, max_size=7), seeds, st.booleans())
@settings(deadline=None, max_examples=60)
def test_reduce_scatter_and_all_gather_with_uneven_segments(counts: list[int], seed: int, ring: bool) -> None:
    size = len(counts)
    tensors = [values(rank, sum(counts)) for rank in range(size)]
    expected = split(sum(tensors, torch.zeros(sum(counts), dtype=torch.float64)), counts)
    segments = [split(tensor, counts) for tensor in tensors]
    scatter = ring_reduce_scatter if ring else direct_reduce_scatter
    gather = ring_all_gather if ring else direct_all_gather
    run(seed, [acknowledged(rank, size, scatter(rank, segments[rank], add)) for rank in range(size)])
    for rank in range(size):
        torch.testing.assert_close(segments[rank][rank], expected[rank])
    run(seed, [acknowledged(rank, size, gather(rank, segments[rank])) for rank in range(size)])
    assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)
    torch.testing.assert_close(tensors[0], torch.cat(expected))


@given(sizes, lengths, seeds, st.integers(0, 8))
@settings(deadline=None, max_examples=60)
def test_collectives_with_a_root(size: int, length: int, seed: int, root: int) -> None:
    root %= size
    tensors = [values(rank, length) for rank in range(size)]
    expected = tensors[root].clone()
    run(seed, [broadcast(rank, size, root, tensors[rank]) for rank in range(size)])
    assert all(torch.equal(tensor, expected) for tensor in tensors)
    tensors = [values(rank, length) for rank in range(size)]
    greatest = torch.stack(tensors).amax(dim=0)
    run(seed, [reduce(rank, size, root, tensors[rank], maximum) for rank in range(size)])
    assert torch.equal(tensors[root], greatest)
    given_ = [values(rank, length) for rank in range(size)]
    found = [torch.empty(length, dtype=torch.float64) for _ in range(size)]
    run(seed, [direct_scatter(rank, root, given_ if rank == root else [], found[rank]) for rank in range(size)])
    assert all(torch.equal(found[rank], given_[rank]) for rank in range(size))
    gathered = [torch.empty(length, dtype=torch.float64) for _ in range(size)]
    run(seed, [direct_gather(rank, root, found[rank], gathered if rank == root else []) for rank in range(size)])
    assert all(torch.equal(gathered[rank], given_[rank]) for rank in range(size))


@given(st.integers(1, 6), seeds)
@settings(deadline=None, max_examples=40)
def test_all_to_all_with_uneven_parts(size: int, seed: int) -> None:
    generator = random.Random(seed)
    counts = [[generator.randrange(5) for _ in range(size)] for _ in range(size)]
    outgoing = [[values(100 * a + b, counts[a][b]) for b in range(size)] for a in range(size)]
    incoming = [[torch.empty(counts[b][a], dtype=torch.float64) for b in range(size)] for a in range(size)]
    run(seed, [direct_exchange(rank, outgoing[rank], incoming[rank]) for rank in range(size)])
    assert all(torch.equal(incoming[a][b], outgoing[b][a]) for a in range(size) for b in range(size))


@pytest.mark.parametrize("size", [2, 5, 9])
def test_nobody_leaves_a_barrier_before_all_have_entered(size: int) -> None:
    network = Network(size, random.Random(1))
    nothing = torch.empty(0)
    started = [
        network.start(WorkerId(rank), lambda r, s, t: tree_barrier(r, s, nothing), nothing, keep=False)
        for rank in range(size - 1)
    ]
    network.run()
    assert not any(operation.finished for operation in started)
    network.start(WorkerId(size - 1), lambda r, s, t: tree_barrier(r, s, nothing), nothing, keep=False)
    network.run()
    assert all(operation.finished for operation in started)


def shared(size: int) -> list[Arenas]:
    memory = [torch.zeros(HEADER_BYTES + 4 * 64 * 3, dtype=torch.uint8) for _ in range(size)]
    return [Arenas(rank, memory, 0) for rank in range(size)]


@given(st.integers(1, 6), lengths, seeds, st.booleans())
@settings(deadline=None, max_examples=60)
def test_shared_memory_gives_the_same_as_links(size: int, length: int, seed: int, small: bool) -> None:
    arenas = shared(size)
    if length * 8 > arenas[0].capacity(torch.uint8) or not small:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared_memory, "SMALL_BYTES", 0)
            check_shared_memory(arenas, length, seed)
    else:
        check_shared_memory(arenas, length, seed)


def check_shared_memory(arenas: list[Arenas], length: int, seed: int) -> None:
    size = len(arenas)
    for _ in range(3):  # slots are used in turn
        tensors = [values(rank, length) for rank in range(size)]
        expected = sum(tensors, torch.zeros(length, dtype=torch.float64))
        run(seed, [shared_all_reduce(arenas[rank], tensors[rank], add) for rank in range(size)])
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)
        torch.testing.assert_close(tensors[0], expected)
        counts = even_segments(length, size)
        segments = [split(values(rank, length), counts) for rank in range(size)]
        run(
            seed,
            [
                acknowledged(rank, size, shared_reduce_scatter(arenas[rank], segments[rank], add))
                for rank in range(size)
            ],
        )
        torch.testing.assert_close(torch.cat([segments[rank][rank] for rank in range(size)]), expected)
        run(
            seed,
            [acknowledged(rank, size, shared_all_gather(arenas[rank], segments[rank])) for rank in range(size)],
        )
        for rank in range(size):
            torch.testing.assert_close(torch.cat(segments[rank]), expected)


def test_who_waits_in_the_last_barrier_can_finish_from_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "SMALL_BYTES", 0)
    arenas = shared(3)
    tensors = [values(rank, 11) for rank in range(3)]
    expected = sum(tensors, torch.zeros(11, dtype=torch.float64))
    network = Network(3, random.Random(0))
    operations = [
        network.start(
            WorkerId(rank), lambda r, s, t: shared_all_reduce(arenas[r], tensors[r], add), tensors[rank], keep=False
        )
        for rank in range(3)
    ]
    while not operations[0].finished:
        for rank in (2, 1, 0):
            network.look(WorkerId(rank))
    assert not operations[2].finished
    shared_catch_up(arenas[2], tensors[2], add)
    torch.testing.assert_close(tensors[2], expected)
