"""Collectives against naive oracles, all ranks in one process, frames in any order."""

import math
import random
from collections.abc import Callable

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
from elaswave.comm.collectives.grid import (
    dimensions_of,
    grid_all_gather,
    grid_all_reduce,
    grid_reduce_scatter,
    halved_all_reduce,
)
from elaswave.comm.collectives.reduction import Combine, add, even_segments, maximum, split, whole_of
from elaswave.comm.collectives.shared_memory import (
    HEADER_BYTES,
    Arenas,
    shared_all_gather,
    shared_all_reduce,
    shared_reduce_scatter,
)
from elaswave.comm.collectives.tree import tree_all_gather, tree_all_reduce, tree_barrier
from elaswave.core.ids import WorkerId
from tests.comm.simulated import Network

sizes = st.integers(1, 12)
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


@given(sizes, lengths, seeds, st.sampled_from((tree_all_reduce, halved_all_reduce, grid_all_reduce)))
@settings(deadline=None, max_examples=100)
def test_all_reduce_gives_the_sum_and_the_same_bits_on_all_ranks(
    size: int, length: int, seed: int, all_reduce: Callable[[int, int, Tensor, Combine], Collective]
) -> None:
    tensors = [values(rank, length) for rank in range(size)]
    expected = sum(tensors, torch.zeros(length, dtype=torch.float64))

    def make(rank: int) -> Collective:
        return acknowledged(rank, size, all_reduce(rank, size, tensors[rank], add))

    run(seed, [make(rank) for rank in range(size)])
    assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)
    torch.testing.assert_close(tensors[0], expected)
    again = [values(rank, length) for rank in range(size)]
    first, tensors[:] = tensors[0].clone(), again
    run(seed + 12345, [make(rank) for rank in range(size)])
    assert torch.equal(tensors[0], first), "the bits depend on the order of arrival"


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), seeds, st.booleans())
@settings(deadline=None, max_examples=100)
def test_reduce_scatter_and_all_gather_with_uneven_segments(counts: list[int], seed: int, direct: bool) -> None:
    size = len(counts)
    tensors = [values(rank, sum(counts)) for rank in range(size)]
    expected = split(sum(tensors, torch.zeros(sum(counts), dtype=torch.float64)), counts)
    segments = [split(tensor, counts) for tensor in tensors]
    gather = direct_all_gather if direct else grid_all_gather

    def scatter(rank: int) -> Collective:
        if direct:
            return direct_reduce_scatter(rank, segments[rank], add)
        return grid_reduce_scatter(rank, tensors[rank], counts, add)

    run(seed, [acknowledged(rank, size, scatter(rank)) for rank in range(size)])
    for rank in range(size):
        torch.testing.assert_close(segments[rank][rank], expected[rank])
    run(seed, [acknowledged(rank, size, gather(rank, segments[rank])) for rank in range(size)])
    assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)
    torch.testing.assert_close(tensors[0], torch.cat(expected))


@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), seeds, st.booleans())
@settings(deadline=None, max_examples=60)
def test_all_gather_through_a_tree_and_into_tensors_that_lie_apart(counts: list[int], seed: int, tree: bool) -> None:
    size = len(counts)
    expected = torch.cat([values(rank, count) for rank, count in enumerate(counts)])
    wholes = [values(99, sum(counts)) for _ in range(size)]
    apart = [[values(99, count) for count in counts] for _ in range(size)]
    for rank, count in enumerate(counts):
        split(wholes[rank], counts)[rank].copy_(values(rank, count))
        apart[rank][rank].copy_(values(rank, count))
    if tree:
        run(seed, [acknowledged(rank, size, tree_all_gather(rank, wholes[rank], counts)) for rank in range(size)])
        assert all(torch.equal(whole, expected) for whole in wholes)
    else:
        run(seed, [acknowledged(rank, size, grid_all_gather(rank, apart[rank])) for rank in range(size)])
        assert all(torch.equal(torch.cat(segments), expected) for segments in apart)


def test_dimensions_multiply_to_the_number_of_ranks() -> None:
    for size in range(1, 100):
        assert math.prod(dimensions_of(size)) == size
    assert [dimensions_of(size) for size in (1, 2, 4, 6, 8, 24, 31, 32)] == [
        (),
        (2,),
        (2, 2),
        (2, 3),
        (2, 2, 2),
        (2, 2, 2, 3),
        (31,),
        (2, 2, 2, 2, 2),
    ]


def test_a_whole_is_a_view_only_of_what_lies_in_one_piece_of_memory() -> None:
    tensor = torch.arange(12.0)
    pieces = [*tensor[2:].split([3, 0, 7])]
    assert whole_of(pieces).data_ptr() == tensor[2:].data_ptr()
    assert torch.equal(whole_of(pieces), tensor[2:])
    for apart in ([tensor[:2], tensor[3:5]], [tensor[2:4], tensor[:2]], [tensor[::2]], [torch.ones(2), torch.ones(2)]):
        found = whole_of(apart)
        assert found.numel() == sum(piece.numel() for piece in apart)
        assert all(found.data_ptr() != piece.data_ptr() for piece in apart)
    assert whole_of([tensor[:0], tensor[5:5]]).numel() == 0


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
        run(seed, [shared_all_reduce(arenas[rank], tensors[rank], add).collective for rank in range(size)])
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)
        torch.testing.assert_close(tensors[0], expected)
        counts = even_segments(length, size)
        segments = [split(values(rank, length), counts) for rank in range(size)]
        outputs = [torch.empty_like(segments[rank][rank]) for rank in range(size)]
        run(
            seed,
            [
                shared_reduce_scatter(arenas[rank], outputs[rank], segments[rank], add).collective
                for rank in range(size)
            ],
        )
        torch.testing.assert_close(torch.cat(outputs), expected)
        for rank in range(size):
            segments[rank][rank].copy_(outputs[rank])
        run(seed, [shared_all_gather(arenas[rank], segments[rank]).collective for rank in range(size)])
        for rank in range(size):
            torch.testing.assert_close(torch.cat(segments[rank]), expected)


def test_who_waits_in_the_last_barrier_can_finish_from_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "SMALL_BYTES", 0)
    arenas = shared(3)
    tensors = [values(rank, 11) for rank in range(3)]
    expected = sum(tensors, torch.zeros(11, dtype=torch.float64))
    network = Network(3, random.Random(0))
    shares = [shared_all_reduce(arenas[rank], tensors[rank], add) for rank in range(3)]

    def make(rank: int, size: int, tensor: Tensor) -> Collective:
        return shares[rank].collective

    operations = [network.start(WorkerId(rank), make, tensors[rank], keep=False) for rank in range(3)]
    while not operations[0].finished:
        for rank in (2, 1, 0):
            network.look(WorkerId(rank))
    assert not operations[2].finished
    shares[2].catch_up()
    torch.testing.assert_close(tensors[2], expected)
