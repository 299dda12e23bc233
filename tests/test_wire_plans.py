"""Plans as deltas: applying the difference gives the plan, and only what changed is sent."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave._pb import control_pb2
from elaswave.core.ids import Epoch, Layer, NodeId, ShardId, Step, WorkerId
from elaswave.core.plan import Group, Hop, Member, Plan, Route, RouteTable
from elaswave.core.reduce_plan import ReducePlan
from elaswave.errors import InvariantError, ProtocolError
from elaswave.wire import apply_plan_delta, parse, plan_delta

workers = st.integers(0, 9).map(WorkerId)
addresses = st.sampled_from(["", "unix:/run/w.sock", "tcp:127.0.0.1:4000"])


@st.composite
def members(draw: st.DrawFn) -> tuple[Member, ...]:
    ids = draw(st.lists(workers, unique=True, max_size=6))
    return tuple(
        Member(
            worker=worker,
            node=NodeId(draw(st.sampled_from(["n0", "n1"]))),
            local_index=worker,
            incarnation=draw(st.integers(0, 2)),
            address=draw(addresses),
        )
        for worker in ids
    )


@st.composite
def routes(draw: st.DrawFn, layers: int, epoch: int) -> Route:
    cuts = sorted(draw(st.sets(st.integers(1, layers - 1), max_size=2)) if layers > 1 else ())
    edges = [0, *cuts, layers]
    return tuple(
        Hop(
            worker=draw(workers),
            epoch=Epoch(draw(st.integers(0, epoch))),
            first=Layer(first),
            last=Layer(last),
        )
        for first, last in pairwise(edges)
    )


@st.composite
def groups(draw: st.DrawFn) -> Group:
    copies = draw(st.lists(workers, unique=True, max_size=5))
    roles = [draw(st.sampled_from(["replicas", "joining", "catch_up"])) for _ in copies]
    owner = copies[0] if copies and draw(st.booleans()) else None
    named: dict[str, tuple[WorkerId, ...]] = {
        role: tuple(w for w, r in zip(copies, roles, strict=True) if r == role and w != owner)
        for role in ("replicas", "joining", "catch_up")
    }
    return Group(owner=owner, **named)


@st.composite
def reduce_plans(draw: st.DrawFn, epoch: int) -> ReducePlan:
    order = tuple(draw(st.lists(workers, unique=True, max_size=4)))
    return ReducePlan(
        kind="ring" if order else "direct",
        order=order,
        epoch=Epoch(draw(st.integers(0, epoch))),
        first_step=Step(draw(st.integers(0, 9))),
    )


@st.composite
def plans(
    draw: st.DrawFn, epoch: int, layers: int, micro_batches: int, shards: int, *, ringed: frozenset[Layer]
) -> Plan:
    steps = sorted(draw(st.sets(st.integers(0, 5), min_size=1, max_size=3)))
    table_routes = st.tuples(*[routes(layers, epoch) for _ in range(micro_batches)])
    shard_epochs = st.dictionaries(st.integers(0, shards).map(ShardId), st.integers(1, epoch).map(Epoch), max_size=3)
    present = draw(members())
    ids = sorted({found.worker for found in present})
    return Plan(
        epoch=Epoch(epoch),
        reason=draw(st.text(max_size=10)),
        members=present,
        callers=tuple(draw(st.lists(st.sampled_from(ids), unique=True, max_size=2))) if ids else (),
        hosting=draw(
            st.dictionaries(workers, st.lists(st.integers(0, 9).map(Layer), unique=True, max_size=3).map(tuple))
        ),
        tables=tuple(RouteTable(first_step=Step(step), routes=draw(table_routes)) for step in steps),
        groups=draw(st.tuples(*[groups() for _ in range(shards)])),
        queries=draw(shard_epochs),
        gates=draw(shard_epochs),
        reduce_plans={layer: draw(reduce_plans(epoch)) for layer in ringed},
        finished=draw(st.booleans()),
    )


@st.composite
def plan_sequences(draw: st.DrawFn) -> list[Plan]:
    layers, micro_batches, shards = draw(st.integers(1, 4)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    first = draw(st.integers(1, 5))
    ringed = draw(st.frozensets(st.integers(0, layers - 1).map(Layer)))
    return [draw(plans(first + index, layers, micro_batches, shards, ringed=ringed)) for index in range(3)]


def over_the_wire(delta: control_pb2.PlanDelta) -> control_pb2.PlanDelta:
    return parse(control_pb2.PlanDelta, delta.SerializeToString())


@given(plan_sequences())
def test_applying_deltas_gives_every_plan(sequence: list[Plan]) -> None:
    mine: Plan | None = None
    previous: Plan | None = None
    for plan in sequence:
        mine = apply_plan_delta(mine, over_the_wire(plan_delta(previous, plan)))
        assert mine == plan
        assert [*mine.members] == [*plan.members]
        previous = plan


@given(plan_sequences())
def test_whole_plan_lets_a_newcomer_in_at_any_epoch(sequence: list[Plan]) -> None:
    old, new = sequence[:2]
    mine = apply_plan_delta(None, over_the_wire(plan_delta(None, old)))
    assert apply_plan_delta(mine, over_the_wire(plan_delta(old, new))) == new


def member(worker: int, address: str = "") -> Member:
    return Member(worker=WorkerId(worker), node=NodeId("n0"), local_index=worker, incarnation=0, address=address)


def hop(worker: int, first: int, last: int, epoch: int = 1) -> Hop:
    return Hop(worker=WorkerId(worker), epoch=Epoch(epoch), first=Layer(first), last=Layer(last))


def base_plan() -> Plan:
    """Two stages of two workers, four micro-batches, four layers, two shards."""
    return Plan(
        epoch=Epoch(1),
        reason="start",
        members=tuple(member(worker) for worker in range(4)),
        hosting={WorkerId(w): (Layer(0), Layer(1)) if w < 2 else (Layer(2), Layer(3)) for w in range(4)},
        tables=(
            RouteTable(first_step=Step(0), routes=tuple((hop(m % 2, 0, 2), hop(2 + m % 2, 2, 4)) for m in range(4))),
        ),
        groups=(
            Group(owner=WorkerId(0), replicas=(WorkerId(1),)),
            Group(owner=WorkerId(2), replicas=(WorkerId(3),)),
        ),
    )


def successor(plan: Plan, **changes: object) -> Plan:
    return dataclasses.replace(plan, epoch=Epoch(plan.epoch + 1), **changes)  # type: ignore[arg-type]


def test_delta_of_an_equal_plan_is_small() -> None:
    plan = base_plan()
    delta = plan_delta(plan, successor(plan))
    assert delta.ByteSize() < 20
    for field in (
        "members_added",
        "members_removed",
        "hosting",
        "tables",
        "groups",
        "queries",
        "gates",
        "reduce_plans",
    ):
        assert not getattr(delta, field), field


def test_delta_of_a_loss_names_only_what_died() -> None:
    plan = base_plan()
    moved = (hop(0, 0, 2, epoch=2), *plan.tables[0].routes[1][1:])
    table = RouteTable(first_step=Step(0), routes=(plan.tables[0].routes[0], moved, *plan.tables[0].routes[2:]))
    lost = successor(
        plan,
        members=tuple(m for m in plan.members if m.worker != 1),
        hosting={w: layers for w, layers in plan.hosting.items() if w != 1},
        tables=(table,),
        groups=(Group(owner=WorkerId(0)), plan.groups[1]),
    )
    delta = plan_delta(plan, lost)
    assert list(delta.members_removed) == [1]
    assert not delta.members_added
    assert not delta.hosting
    assert [[route.micro_batch for route in found.routes] for found in delta.tables] == [[1]]
    assert [group.shard for group in delta.groups] == [0]
    assert apply_plan_delta(plan, delta) == lost


def test_new_table_starts_from_the_newest_one() -> None:
    plan = base_plan()
    announced = RouteTable(first_step=Step(7), routes=plan.tables[0].routes)
    delta = plan_delta(plan, successor(plan, tables=(*plan.tables, announced)))
    assert list(delta.first_steps) == [0, 7]
    assert not delta.tables
    assert apply_plan_delta(plan, delta).tables == (*plan.tables, announced)


def test_newest_table_is_the_last_one() -> None:
    plan = base_plan()
    late = RouteTable(first_step=Step(7), routes=tuple((hop(m % 2, 0, 1), hop(2, 1, 4)) for m in range(4)))
    two = successor(plan, tables=(*plan.tables, late))
    later = RouteTable(first_step=Step(9), routes=late.routes)
    delta = plan_delta(two, successor(two, tables=(late, later)))
    assert not delta.tables
    assert apply_plan_delta(two, delta).tables == (late, later)


def test_changed_member_keeps_its_place() -> None:
    plan = base_plan()
    changed = (member(0), member(1, "unix:/s"), *plan.members[2:])
    delta = plan_delta(plan, successor(plan, members=changed))
    assert [m.worker for m in delta.members_added] == [1]
    assert apply_plan_delta(plan, delta).members == changed


def test_member_without_layers_differs_from_member_without_entry() -> None:
    plan = base_plan()
    none = successor(plan, hosting={**plan.hosting, WorkerId(3): ()})
    absent = successor(plan, hosting={w: layers for w, layers in plan.hosting.items() if w != 3})
    assert apply_plan_delta(plan, plan_delta(plan, none)).hosting == none.hosting
    assert apply_plan_delta(plan, plan_delta(plan, absent)).hosting == absent.hosting
    assert apply_plan_delta(plan, plan_delta(plan, absent)).members == plan.members
    assert [m.worker for m in plan_delta(plan, absent).members_added] == [3]


@pytest.mark.parametrize("epoch", [1, 3])
def test_epochs_rise_by_one(epoch: int) -> None:
    plan = base_plan()
    other = dataclasses.replace(plan, epoch=Epoch(epoch))
    with pytest.raises(InvariantError, match="rise by one"):
        plan_delta(plan, other)
    with pytest.raises(ProtocolError, match=r"PlanDelta\.epoch"):
        apply_plan_delta(plan, plan_delta(None, other))


def test_micro_batches_and_shards_cannot_shrink() -> None:
    plan = base_plan()
    fewer = RouteTable(first_step=Step(0), routes=plan.tables[0].routes[:2])
    with pytest.raises(InvariantError, match="micro-batches"):
        plan_delta(plan, successor(plan, tables=(fewer,)))
    with pytest.raises(InvariantError, match="shards"):
        plan_delta(plan, successor(plan, groups=plan.groups[:1]))


def test_a_layer_cannot_lose_its_reduce_plan() -> None:
    ring = ReducePlan(kind="ring", order=(WorkerId(1), WorkerId(0)), epoch=Epoch(1), first_step=Step(0))
    plan = dataclasses.replace(base_plan(), reduce_plans={Layer(1): ring})
    with pytest.raises(InvariantError, match="reduce plan for layer 1: name it as direct"):
        plan_delta(plan, successor(plan, reduce_plans={}))


def test_query_of_epoch_zero_cannot_be_sent() -> None:
    plan = base_plan()
    with pytest.raises(InvariantError, match="shard 1"):
        plan_delta(plan, successor(plan, queries={ShardId(1): Epoch(0)}))


def _add_member(worker: int, node: str, address: str) -> Callable[[control_pb2.PlanDelta], None]:
    def change(delta: control_pb2.PlanDelta) -> None:
        delta.members_added.add(worker=worker, node=node, address=address)

    return change


def _add_route(micro_batch: int, *hops: tuple[int, int, int]) -> Callable[[control_pb2.PlanDelta], None]:
    def change(delta: control_pb2.PlanDelta) -> None:
        table = delta.tables[0] if delta.tables else delta.tables.add(first_step=0)
        route = table.routes.add(micro_batch=micro_batch)
        for first, last, epoch in hops:
            route.hops.add(worker=0, first=first, last=last, epoch=epoch)

    return change


@pytest.mark.parametrize(
    ("field", "change"),
    [
        (r"PlanDelta\.epoch is 7", lambda d: setattr(d, "epoch", 7)),
        (r"length of PlanDelta\.reason", lambda d: setattr(d, "reason", "x" * 70000)),
        (r"PlanDelta\.members_added", lambda d: [_add_member(1, "n", "")(d) for _ in range(2)]),
        (r"Member\.node", _add_member(9, "", "")),
        (r"Member\.address", _add_member(9, "n", "http:x")),
        (r"Member\.address", _add_member(9, "n", "unix:")),
        (r"PlanDelta\.hosting", lambda d: [d.hosting.add(worker=1) for _ in range(2)]),
        (r"Hosting\.layers", lambda d: d.hosting.add(worker=1, layers=[3, 3])),
        (r"Hosting\.layers is 65536", lambda d: d.hosting.add(worker=1, layers=[65536])),
        (r"PlanDelta\.first_steps", lambda d: d.first_steps.extend([5, 4])),
        (r"PlanDelta\.first_steps", lambda d: d.first_steps.append(2**64 - 1)),
        (r"RouteTable\.first_step", lambda d: d.tables.add(first_step=3)),
        (r"PlanDelta\.tables", lambda d: [d.tables.add(first_step=0) for _ in range(2)]),
        (r"RouteTable\.routes", lambda d: [_add_route(0, (0, 4, 1))(d) for _ in range(2)]),
        (r"RouteTable\.routes lacks entry 4", _add_route(5, (0, 4, 1))),
        (r"Route\.micro_batch", _add_route(65536, (0, 4, 1))),
        (r"Route\.hops", _add_route(0)),
        (r"Hop\.first", _add_route(0, (1, 4, 1))),
        (r"Hop\.first", _add_route(0, (0, 2, 1), (3, 4, 1))),
        (r"Hop\.last", _add_route(0, (0, 2, 1), (2, 2, 1))),
        (r"Hop\.last", _add_route(0, (0, 5, 1))),
        (r"Hop\.epoch", _add_route(0, (0, 4, 3))),
        (r"PlanDelta\.groups lacks entry 2", lambda d: d.groups.add(shard=3)),
        (r"PlanDelta\.groups", lambda d: [d.groups.add(shard=1) for _ in range(2)]),
        (r"Group is", lambda d: d.groups.add(shard=1, owner=2, replicas=[2])),
        (r"PlanDelta\.queries\.epoch", lambda d: d.queries.add(shard=1, epoch=3)),
        (r"PlanDelta\.reduce_plans", lambda d: [d.reduce_plans.add(layer=1, kind="direct") for _ in range(2)]),
        (r"PlanDelta\.reduce_plans is 65536", lambda d: d.reduce_plans.add(layer=65536, kind="direct")),
        (r"ReducePlan\.kind is 'tree'", lambda d: d.reduce_plans.add(layer=1, kind="tree")),
        (r"ReducePlan\.order", lambda d: d.reduce_plans.add(layer=1, kind="ring")),
        (r"ReducePlan\.order", lambda d: d.reduce_plans.add(layer=1, kind="direct", order=[1])),
        (r"ReducePlan\.order", lambda d: d.reduce_plans.add(layer=1, kind="ring", order=[1, 1])),
        (r"ReducePlan\.epoch", lambda d: d.reduce_plans.add(layer=1, kind="direct", epoch=3)),
        (r"ReducePlan\.first_step", lambda d: d.reduce_plans.add(layer=1, kind="direct", first_step=2**64 - 1)),
        (r"PlanDelta\.callers is 9", lambda d: d.callers.append(9)),
        (r"PlanDelta\.callers", lambda d: d.callers.extend([1, 1])),
        (r"PlanDelta\.callers", lambda d: d.callers.extend([1, 2, 3])),
        (r"PlanDelta\.gates", lambda d: [d.gates.add(shard=1, epoch=1) for _ in range(2)]),
    ],
)
def test_bad_deltas_are_refused_by_field(field: str, change: Callable[[control_pb2.PlanDelta], object]) -> None:
    plan = base_plan()
    delta = plan_delta(plan, successor(plan))
    change(delta)
    with pytest.raises(ProtocolError, match=field):
        apply_plan_delta(plan, over_the_wire(delta))
