"""Several workers that join at once share what they take over."""

from elaswave.core.ids import Layer, NodeId, Step, WorkerId
from elaswave.core.layout import Layout, partition_layers
from elaswave.core.plan import Member
from elaswave.core.planner.context import PlanningContext
from elaswave.core.planner.initial import initial_plan, make_shape
from elaswave.core.planner.join import plan_join
from elaswave.core.shape import CHUNK_ELEMENTS, Block


def _member(worker: int) -> Member:
    return Member(worker=WorkerId(worker), node=NodeId(f"n{worker}"), local_index=0, incarnation=0)


def test_joiners_of_one_stage_take_different_shards() -> None:
    layout = Layout(dp=4, pp=1)
    shape = make_shape(2, tuple(Block(layers=(Layer(i),), elements=8 * CHUNK_ELEMENTS) for i in range(2)), layout)
    plan = initial_plan(
        shape=shape,
        layout=layout,
        members=[_member(worker) for worker in range(4)],
        micro_batches=4,
        replicas=1,
        step=Step(0),
    )
    context = PlanningContext(shape=shape, stages=partition_layers(2, 1), replicas=1, micro_batches=4)
    joined = plan_join(context, plan, (_member(7), _member(8)), "two join")
    shards = [shard for shard, _ in joined.swaps]
    assert shards
    assert len(shards) == len(set(shards))
    assert {worker for _, worker in joined.swaps} == {7, 8}
