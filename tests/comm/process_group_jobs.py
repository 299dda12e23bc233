"""Jobs in which nobody is lost: what torch.distributed offers, and what torch builds upon it."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from pytest import raises
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from elaswave.errors import ConfigError
from tests.comm.process_group_place import Place, job, joined

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (5, 7), (0,), (3, 0), (400, 60))


def made(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small integers, so that every sum is exact; matrices are not contiguous."""
    turned = (shape[1], shape[0]) if len(shape) == 2 else shape
    count = torch.Size(turned).numel()
    found = ((torch.arange(count) * 3 + rank * 7) % 5 - int(dtype != torch.bool)).to(dtype).view(turned)
    return found.t() if len(shape) == 2 else found


def same(found: Tensor, expected: Tensor, what: object = "") -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape, what
    assert torch.equal(found, expected), (what, found, expected)


def reductions(dtype: torch.dtype) -> dict[object, Callable[[Tensor], Tensor]]:
    """What each reduce operator makes of the stacked contributions of all ranks."""
    if dtype == torch.bool:
        return {dist.ReduceOp.SUM: lambda every: every.any(0), dist.ReduceOp.MIN: lambda every: every.all(0)}
    found: dict[object, Callable[[Tensor], Tensor]] = {dist.ReduceOp.SUM: lambda every: every.sum(0)}
    if dtype == torch.int64:
        found[dist.ReduceOp.AVG] = lambda every: every.sum(0) // len(every)
        found[dist.ReduceOp.BXOR] = lambda every: every[0] ^ every[1] ^ every[2] ^ every[3]
    else:
        found[dist.ReduceOp.AVG] = lambda every: every.sum(0) / len(every)
    if not dtype.is_complex:  # torch itself refuses these for complex numbers
        found[dist.ReduceOp.MAX] = lambda every: every.amax(0)
        found[dist.ReduceOp.PRODUCT] = lambda every: every.prod(0)
    return found


@job
def reduce_everything(place: Place) -> object:
    count = 0
    with joined(place):
        for dtype in DTYPES:
            for shape in SHAPES:
                stacked = torch.stack([made(rank, shape, dtype) for rank in range(place.size)])
                for operator, reduced in reductions(dtype).items():
                    what, expected = (dtype, shape, operator), reduced(stacked)
                    tensor = made(place.rank, shape, dtype)
                    dist.all_reduce(tensor, operator)
                    same(tensor, expected, what)
                    tensor = made(place.rank, shape, dtype)
                    work = dist.reduce(tensor, place.size - 1, operator, async_op=True)
                    work.wait()
                    same(tensor, expected if place.rank == place.size - 1 else made(place.rank, shape, dtype), what)
                    output = torch.empty_like(tensor)
                    inputs = [made(place.rank + 2 * other, shape, dtype) for other in range(place.size)]
                    dist.reduce_scatter(output, inputs, operator)
                    given = [made(other + 2 * place.rank, shape, dtype) for other in range(place.size)]
                    same(output, reduced(torch.stack(given)), what)
                    count += 1
        # refused before anything is sent, so that nothing is left half done
        for dtype, operator in ((torch.float32, dist.ReduceOp.BAND), (torch.float8_e4m3fn, dist.ReduceOp.SUM)):
            with raises(ConfigError, match="not defined for"):
                dist.all_reduce(torch.ones(3).to(dtype), operator)
        dist.barrier()
    return count


@job
def move_everything(place: Place) -> object:
    with joined(place):
        for dtype in DTYPES:
            for shape in SHAPES:
                move(place, dtype, shape)
    return True


def move(place: Place, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rank, size, what = place.rank, place.size, (dtype, shape)
    mine, all_of = made(rank, shape, dtype), [made(other, shape, dtype) for other in range(size)]

    def empty() -> list[Tensor]:
        return [torch.empty_like(mine) for _ in range(size)]

    tensor = mine.clone()
    dist.broadcast(tensor, 2)
    same(tensor, all_of[2], what)
    outputs = empty()
    dist.all_gather(outputs, mine)
    for found, expected in zip(outputs, all_of, strict=True):
        same(found, expected, what)
    outputs = empty()
    dist.gather(mine, outputs if rank == 1 else None, 1)
    if rank == 1:
        same(torch.stack(outputs), torch.stack(all_of), what)
    output = torch.empty_like(mine)
    dist.scatter(output, [made(other + 5, shape, dtype) for other in range(size)] if rank == 3 else None, 3)
    same(output, made(rank + 5, shape, dtype), what)
    outputs = empty()
    dist.all_to_all(outputs, [made(3 * rank + other, shape, dtype) for other in range(size)])
    same(torch.stack(outputs), torch.stack([made(3 * other + rank, shape, dtype) for other in range(size)]), what)
    if not shape:
        return
    joint = torch.empty(size * shape[0], *shape[1:], dtype=dtype)
    dist.all_gather_single(joint, mine)
    same(joint, torch.cat(all_of), what)
    if dtype != torch.bool:
        output = torch.empty(shape, dtype=dtype)
        dist.reduce_scatter_single(output, torch.cat([made(rank + other, shape, dtype) for other in range(size)]))
        same(output, torch.stack([made(rank + other, shape, dtype) for other in range(size)]).sum(0), what)


@job
def uneven_and_objects(place: Place) -> object:
    rank, size = place.rank, place.size
    with joined(place):
        # rank r sends r + other rows to each other, none to itself where both are 0
        rows = [rank + other for other in range(size)]
        given = torch.cat([torch.full((count, 2), 10.0 * rank + other) for other, count in enumerate(rows)])
        output = torch.empty(sum(rows), 2)
        dist.all_to_all_single(output, given, rows, rows)
        same(output, torch.cat([torch.full((count, 2), 10.0 * other + rank) for other, count in enumerate(rows)]))
        even = torch.empty(size)
        dist.all_to_all_single(even, torch.arange(size) + 10.0 * rank)
        same(even, torch.arange(size) * 10.0 + rank)
        outputs = [torch.empty(3 * other, 2) for other in range(size)]
        dist.all_gather(outputs, torch.full((3 * rank, 2), float(rank)))
        same(torch.cat(outputs), torch.cat([torch.full((3 * other, 2), float(other)) for other in range(size)]))

        objects: list[object] = [None] * size
        dist.all_gather_object(objects, {"rank": rank, "text": "x" * (rank * 40_000)})
        assert [found["rank"] for found in objects if isinstance(found, dict)] == list(range(size))
        told: list[object] = [{"from": 1}, [1, 2, 3]] if rank == 1 else [None, None]
        dist.broadcast_object_list(told, 1)
        assert told == [{"from": 1}, [1, 2, 3]]
        got: list[object] = [None]
        dist.scatter_object_list(got, [f"for {other}" for other in range(size)] if rank == 0 else None, 0)
        assert got == [f"for {rank}"]
        gathered: list[object] | None = [None] * size if rank == 2 else None
        dist.gather_object(rank * rank, gathered, 2)
        assert gathered is None or gathered == [other * other for other in range(size)]
        dist.barrier()
    return True


@job
def messages(place: Place) -> object:
    rank, size = place.rank, place.size
    after, before = (rank + 1) % size, (rank - 1) % size
    with joined(place):
        for dtype in DTYPES:
            for shape in SHAPES:
                received = torch.empty_like(made(before, shape, dtype))
                work = dist.irecv(received, before, tag=3)
                assert work is not None
                sent = dist.isend(made(rank, shape, dtype), after, tag=3)
                assert sent is not None
                work.wait()
                sent.wait()
                same(received, made(before, shape, dtype), (dtype, shape))
        tagged = [torch.empty(2), torch.empty(2)]
        for tag in (1, 2):
            dist.send(torch.full((2,), 10.0 * tag + rank), after, tag=tag)
        for tag in (2, 1):
            dist.recv(tagged[tag - 1], before, tag=tag)
        assert [float(found[0]) for found in tagged] == [10.0 + before, 20.0 + before]
        if rank == 0:
            value, sources = torch.empty(1), []
            for _ in range(size - 1):
                source = dist.recv(value, None, tag=9)
                assert int(value) == source
                sources.append(source)
            assert sorted(sources) == list(range(1, size))
        else:
            dist.send(torch.tensor([float(rank)]), 0, tag=9)
        output = torch.empty(4)
        exchange = [
            dist.P2POp(dist.isend, torch.full((4,), float(rank)), after),
            dist.P2POp(dist.irecv, output, before),
        ]
        for found in dist.batch_isend_irecv(exchange):
            found.wait()
        same(output, torch.full((4,), float(before)))
        dist.send_object_list([{"rank": rank}], after)
        objects: list[object] = [None]
        dist.recv_object_list(objects, before)
        assert objects == [{"rank": before}]
        dist.barrier()
    return True


# ---------------------------------------------------------------------- what torch builds upon it


@job
def groups_and_functional_collectives(place: Place) -> object:
    rank, size = place.rank, place.size
    with joined(place):
        even, odd = dist.new_group([0, 2]), dist.new_group([3, 1])
        mine, members = (even, [0, 2]) if rank in (0, 2) else (odd, [1, 3])
        assert dist.get_process_group_ranks(mine) == members
        tensor = torch.full((3,), float(rank))
        dist.all_reduce(tensor, group=mine)
        same(tensor, torch.full((3,), float(sum(members))))
        dist.broadcast(tensor.fill_(rank), members[1], group=mine)
        same(tensor, torch.full((3,), float(members[1])))

        total = functional.all_reduce(torch.full((5,), float(rank)), "avg", dist.group.WORLD)
        same(total + 0, torch.full((5,), 1.5))
        for length in (2, 0):
            joint = functional.all_gather_tensor(torch.full((length,), float(rank)), 0, dist.group.WORLD)
            same(joint + 0, torch.arange(4.0).repeat_interleave(length))
            part = functional.reduce_scatter_single(torch.ones(4 * length), "sum", 0, dist.group.WORLD)
            same(part + 0, torch.full((length,), 4.0))
        many = functional.all_gather_single_coalesced([torch.ones(2), torch.ones(0)], dist.group.WORLD)
        assert [found.numel() for found in many] == [8, 0]
        turned = functional.all_to_all_single(torch.arange(4.0) + 10 * rank, None, None, dist.group.WORLD)
        same(turned + 0, torch.arange(4.0) * 10 + rank)
        with dist._coalescing_manager(async_ops=True) as manager:
            first, second = torch.ones(3), torch.ones(40_000)
            dist.all_reduce(first)
            dist.all_reduce(second)
        manager.wait()
        assert float(first[0]) == float(second[-1]) == size

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        whole = torch.arange(60.0).view(10, 6)
        by_rows = distribute_tensor(whole, mesh, [Shard(0), Replicate()])
        by_columns = by_rows.redistribute(mesh, [Shard(1), Shard(0)])
        same(by_columns.full_tensor(), whole)
        product = by_rows @ distribute_tensor(whole.t(), mesh, [Replicate(), Shard(1)])
        same(product.full_tensor(), whole @ whole.t())
        same(DTensor.from_local(whole, mesh, [Partial(), Replicate()]).full_tensor(), 2 * whole)
        dist.destroy_process_group(mine)
        dist.barrier()
    return True
