"""Random layouts, members, models and routes for the tests of the planning code."""

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from elaswave.core.ids import Epoch, Layer, NodeId, ShardId, Step, WorkerId
from elaswave.core.layout import Layout, Stage, partition_layers
from elaswave.core.plan import Member, Plan, Route
from elaswave.core.planner.callers import choose_callers
from elaswave.core.planner.context import PlanningContext
from elaswave.core.planner.initial import initial_plan, make_shape
from elaswave.core.routes import balanced_routes, reassign_hops
from elaswave.core.shape import CHUNK_ELEMENTS, Block

NEW = Epoch(7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Routes before and after a loss, who was lost, and who could take the hops of a span."""

    layers: int
    stages: tuple[Stage, ...]
    hosts: tuple[tuple[WorkerId, ...], ...]
    before: tuple[Route, ...]
    after: tuple[Route, ...]
    lost: frozenset[WorkerId]
    candidates: dict[tuple[Layer, Layer], list[WorkerId]]


def grid(dp: int, pp: int) -> tuple[tuple[WorkerId, ...], ...]:
    """Hosts of each stage."""
    return tuple(tuple(WorkerId(d * pp + p) for d in range(dp)) for p in range(pp))


@st.composite
def losses(draw: st.DrawFn) -> Losses:
    """Balanced routes, and the same after a loss; a stage without survivors goes to survivors of other stages."""
    dp, pp = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    layers = draw(st.integers(pp, pp + 5))
    stages, hosts = partition_layers(layers, pp), grid(dp, pp)
    before = balanced_routes(stages, hosts, draw(st.integers(dp, 12)), Epoch(1))
    everyone = [worker for found in hosts for worker in found]
    lost = frozenset(draw(st.lists(st.sampled_from(everyone), unique=True, max_size=len(everyone) - 1)))
    left = [worker for worker in everyone if worker not in lost]
    candidates: dict[tuple[Layer, Layer], list[WorkerId]] = {}
    for stage, found in zip(stages, hosts, strict=True):
        own = [worker for worker in found if worker not in lost]
        others = st.lists(st.sampled_from(left), unique=True, min_size=1)
        candidates[(stage.first, stage.last)] = own or draw(others)
    after = reassign_hops(before, lost, candidates, NEW)
    return Losses(
        layers=layers, stages=stages, hosts=hosts, before=before, after=after, lost=lost, candidates=candidates
    )


def make_members(nodes: Sequence[int]) -> list[Member]:
    """Worker i on node number `nodes[i]`."""
    return [
        Member(worker=WorkerId(index), node=NodeId(f"n{node}"), local_index=index, incarnation=0)
        for index, node in enumerate(nodes)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a first plan is made from, and the plan."""

    context: PlanningContext
    layout: Layout
    members: list[Member]
    plan: Plan

    def first_plan(self, members: Sequence[Member]) -> Plan:
        """The first plan with the members told in another order."""
        return initial_plan(
            shape=self.context.shape,
            layout=self.layout,
            members=members,
            micro_batches=self.context.micro_batches,
            replicas=self.context.replicas,
            step=Step(0),
        )


@st.composite
def jobs(draw: st.DrawFn, smallest: int = 1) -> Job:
    """A job of at least `smallest` workers; every third one or so has a parameter tied between its ends."""
    degrees = st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda found: found[0] * found[1] >= smallest)
    dp, pp = draw(degrees)
    layers = draw(st.integers(pp, pp + 3))
    layout = Layout(dp=dp, pp=pp)
    blocks = [
        Block(layers=(Layer(layer),), elements=CHUNK_ELEMENTS * draw(st.integers(0, 5))) for layer in range(layers)
    ]
    if layers > 1 and draw(st.integers(0, 2)) == 0:
        blocks.append(Block(layers=(Layer(0), Layer(layers - 1)), elements=CHUNK_ELEMENTS * draw(st.integers(1, 5))))
    shape = make_shape(layers, tuple(blocks), layout)
    members = make_members([draw(st.integers(0, 3)) for _ in range(layout.workers)])
    context = PlanningContext(
        shape=shape,
        stages=partition_layers(layers, pp),
        replicas=draw(st.integers(0, min(2, layout.workers - 1))),
        micro_batches=draw(st.integers(dp, 8)),
    )
    plan = initial_plan(
        shape=shape,
        layout=layout,
        members=members,
        micro_batches=context.micro_batches,
        replicas=context.replicas,
        step=Step(0),
    )
    return Job(context=context, layout=layout, members=members, plan=plan)


def check_cover(route: Route, layers: int) -> None:
    """The hops run layers 0 to `layers` - 1, each once and in order."""
    run = [layer for hop in route for layer in range(hop.first, hop.last)]
    assert run == list(range(layers))
    assert all(hop.first < hop.last for hop in route)


def check_plan(context: PlanningContext, plan: Plan) -> None:
    """What holds for every plan, whatever happened before."""
    ids = [member.worker for member in plan.members]
    assert len(set(ids)) == len(ids)
    assert set(plan.hosting) == set(ids)
    firsts = [table.first_step for table in plan.tables]
    assert firsts == sorted(set(firsts))
    for table in plan.tables:
        assert len(table.routes) == context.micro_batches
        for route in table.routes:
            check_cover(route, context.shape.layers)
            for hop in route:
                assert set(range(hop.first, hop.last)) <= set(plan.hosting[hop.worker])
                assert hop.epoch <= plan.epoch
    assert plan.callers
    assert plan.callers == choose_callers(plan.callers, plan.members)
    assert len(plan.groups) == len(context.shape.shards)
    for index, group in enumerate(plan.groups):
        shard = ShardId(index)
        copies = group.everyone
        assert len(set(copies)) == len(copies)
        assert set(copies) <= set(ids)
        assert (group.owner is None) == (shard in plan.queries)
        assert bool(group.joining) == (shard in plan.gates)
        if group.owner is None:
            assert not group.replicas
        else:
            assert len(copies) >= min(context.replicas + 1, len(ids))
