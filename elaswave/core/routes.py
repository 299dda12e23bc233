"""Routes of micro-batches over the hosts of each stage."""

from collections.abc import Mapping, Sequence

from elaswave.core.ids import Epoch, Layer, MicroBatch, WorkerId
from elaswave.core.layout import Stage
from elaswave.core.plan import Hop, Route


def balanced_routes(
    stages: Sequence[Stage], hosts: Sequence[Sequence[WorkerId]], micro_batches: int, epoch: Epoch
) -> tuple[Route, ...]:
    """Deal micro-batches over the hosts of each stage in turn; with equally many hosts these are straight pipelines."""
    return tuple(
        tuple(
            Hop(worker=found[micro_batch % len(found)], epoch=epoch, first=stage.first, last=stage.last)
            for stage, found in zip(stages, hosts, strict=True)
        )
        for micro_batch in range(micro_batches)
    )


def reassign_hops(
    routes: Sequence[Route],
    lost: frozenset[WorkerId],
    candidates: Mapping[tuple[Layer, Layer], Sequence[WorkerId]],
    epoch: Epoch,
) -> tuple[Route, ...]:
    """Give the hops of lost workers, and no other, to candidates for the same layers, evenly.

    A candidate's load is the number of layers it runs over all micro-batches; ties go to the lower id.
    """
    load: dict[WorkerId, int] = {}
    for route in routes:
        for hop in route:
            load[hop.worker] = load.get(hop.worker, 0) + hop.last - hop.first
    result: list[Route] = []
    for route in routes:
        hops: list[Hop] = []
        for hop in route:
            if hop.worker not in lost:
                hops.append(hop)
                continue
            chosen = min(candidates[(hop.first, hop.last)], key=lambda worker: (load.get(worker, 0), worker))
            load[chosen] = load.get(chosen, 0) + hop.last - hop.first
            hops.append(Hop(worker=chosen, epoch=epoch, first=hop.first, last=hop.last))
        result.append(tuple(hops))
    return tuple(result)


def uncovered_layers(route: Route, layers: int) -> tuple[Layer, ...]:
    """Layers that `route` does not run exactly once, in order; empty for a valid route."""
    position = 0
    for hop in route:
        if hop.first != position or hop.last <= hop.first:
            return (Layer(position),)
        position = hop.last
    return tuple(Layer(layer) for layer in range(position, layers))


def moved_hops(old: Sequence[Route], new: Sequence[Route]) -> list[tuple[MicroBatch, Hop]]:
    """Hops of `new` that `old` does not have."""
    return [
        (MicroBatch(index), hop)
        for index, (was, now) in enumerate(zip(old, new, strict=True))
        for hop in now
        if hop not in was
    ]
