"""The first plan of a job."""

from collections.abc import Sequence

from elaswave.core.axes import stage_replicas
from elaswave.core.ids import Step, WorkerId
from elaswave.core.layout import Layout, Stage, check_batch, partition_layers
from elaswave.core.placement import place_shards
from elaswave.core.plan import FIRST_EPOCH, Member, Plan, RouteTable
from elaswave.core.planner.callers import choose_callers
from elaswave.core.routes import balanced_routes
from elaswave.core.shape import CHUNK_ELEMENTS, Block, ModelShape, divide_into_shards
from elaswave.errors import ConfigError


def make_shape(layers: int, blocks: tuple[Block, ...], layout: Layout, least: int = CHUNK_ELEMENTS) -> ModelShape:
    """Divide the model into one shard per block and pipeline: every host of a layer owns an equal part of it.

    Blocks that are too small for shards of `least` elements get fewer; then hosts own different blocks.
    """
    return ModelShape(layers, blocks, divide_into_shards(blocks, layout.dp, least))


def grid_of(layout: Layout, members: Sequence[Member]) -> tuple[tuple[WorkerId, ...], ...]:
    """Workers of each stage, pipeline by pipeline.

    Consecutive workers form a pipeline: its boundaries stay on a node and replicas of a stage spread over nodes.
    """
    ids = sorted(member.worker for member in members)
    return tuple(
        tuple(worker for replica in replicas for worker in replica.workers)
        for replicas in stage_replicas(layout.axes, ids)
    )


def initial_plan(
    *, shape: ModelShape, layout: Layout, members: Sequence[Member], micro_batches: int, replicas: int, step: Step
) -> Plan:
    """Rectangular layout over exactly `layout.workers` members. Raises ConfigError for layouts that do not fit."""
    if len(members) != layout.workers:
        raise ConfigError(
            f"--dp {layout.dp} x --pp {layout.pp} x --tp {layout.tp} needs {layout.workers} workers, not {len(members)}"
        )
    check_batch(micro_batches=micro_batches, layout=layout)
    stages = partition_layers(shape.layers, layout.pp)
    grid = grid_of(layout, members)
    hosting = {worker: stage.layers for stage, workers in zip(stages, grid, strict=True) for worker in workers}
    hosts_of_layer = {layer: grid[p] for p, stage in enumerate(stages) for layer in stage.layers}
    ordered = tuple(sorted(members, key=lambda member: member.worker))
    return Plan(
        epoch=FIRST_EPOCH,
        reason=f"start: {layout.dp} pipelines of {layout.pp} stages",
        members=ordered,
        hosting=hosting,
        tables=(RouteTable(first_step=step, routes=balanced_routes(stages, grid, micro_batches, FIRST_EPOCH)),),
        groups=place_shards(shape, ordered, hosts_of_layer, replicas),
        callers=choose_callers((), ordered),
    )


def stage_hosts(stages: Sequence[Stage], plan: Plan) -> tuple[tuple[WorkerId, ...], ...]:
    """Hosts of each stage: those that host nothing else where there are any, else all that host it."""
    result: list[tuple[WorkerId, ...]] = []
    for stage in stages:
        hosting = {w: set(layers) for w, layers in plan.hosting.items() if set(stage.layers) <= set(layers)}
        own = [worker for worker, layers in hosting.items() if layers == set(stage.layers)]
        result.append(tuple(sorted(own or hosting)))
    return tuple(result)
