"""Plans as deltas: what turns the plan of one epoch into the next one, and a whole plan as a delta from nothing."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from elaswave._pb import control_pb2
from elaswave.core.ids import Epoch, Layer, MicroBatch, NodeId, ShardId, Step, WorkerId
from elaswave.core.plan import Group, Hop, Member, Plan, Route, RouteTable
from elaswave.core.reduce_plan import REDUCE_KINDS, ReduceKind, ReducePlan
from elaswave.errors import InvariantError, ProtocolError
from elaswave.wire import checks

_ADDRESS_KINDS = ("unix", "tcp")
MAX_CALLERS = 2
_Item = TypeVar("_Item")


def plan_delta(previous: Plan | None, plan: Plan) -> control_pb2.PlanDelta:
    """What changed from `previous` to `plan`; with no previous plan, all of `plan`.

    Invariant: apply_plan_delta(previous, plan_delta(previous, plan)) == plan. Raises InvariantError where the epochs
    do not follow each other, or where the number of micro-batches or shards shrinks.
    """
    if previous is not None and plan.epoch != previous.epoch + 1:
        raise InvariantError(f"plan {plan.epoch} cannot follow plan {previous.epoch}: epochs rise by one")
    removed, added = _member_changes(previous, plan)
    kept = _hosting_kept(previous, removed)
    return control_pb2.PlanDelta(
        epoch=plan.epoch,
        reason=checks.sendable(plan.reason, checks.MAX_TEXT),
        members_added=map(_encode_member, added),
        members_removed=removed,
        hosting=[
            control_pb2.Hosting(worker=worker, layers=layers)
            for worker, layers in sorted(plan.hosting.items())
            if kept.get(worker) != layers
        ],
        first_steps=[table.first_step for table in plan.tables],
        tables=_table_changes(previous, plan),
        groups=_group_changes(previous, plan),
        queries=_epoch_changes({} if previous is None else previous.queries, plan.queries),
        gates=_epoch_changes({} if previous is None else previous.gates, plan.gates),
        finished=plan.finished,
        reduce_plans=_reduce_changes(previous, plan),
        callers=plan.callers,
    )


def apply_plan_delta(previous: Plan | None, delta: control_pb2.PlanDelta) -> Plan:
    """The plan that `delta` makes of `previous`.

    Invariants of the result: members, first steps and copies of a shard are without repetition, first steps ascend,
    every route covers the same layers from 0 on without gap, no hop is of a later epoch than the plan. Raises
    ProtocolError that names the field, where `delta` does not follow `previous` or breaks one of these.
    """
    if previous is not None and delta.epoch != previous.epoch + 1:
        raise checks.refuse("PlanDelta.epoch", delta.epoch, f"{previous.epoch + 1}, after plan {previous.epoch}")
    epoch = Epoch(checks.number("PlanDelta.epoch", delta.epoch, 0, checks.MAX_STEP))
    members = _apply_members(previous, delta)
    return Plan(
        epoch=epoch,
        reason=checks.text("PlanDelta.reason", delta.reason, checks.MAX_TEXT),
        members=members,
        hosting=_apply_hosting(previous, delta),
        tables=_apply_tables(previous, delta),
        groups=_apply_groups(previous, delta),
        queries=_apply_epochs("PlanDelta.queries", {} if previous is None else previous.queries, delta.queries, epoch),
        gates=_apply_epochs("PlanDelta.gates", {} if previous is None else previous.gates, delta.gates, epoch),
        callers=_decode_callers(delta, members),
        finished=delta.finished,
        reduce_plans=_apply_reduce_plans(previous, delta),
    )


# ------------------------------------------------------------------ members and hosting


def _member_changes(previous: Plan | None, plan: Plan) -> tuple[list[WorkerId], list[Member]]:
    """Ids to remove, members to add. Adding one that is there replaces it in its place; removing also ends hosting."""
    if previous is None:
        return [], list(plan.members)
    ended = previous.hosting.keys() - plan.hosting.keys()
    gone = previous.ids - plan.ids
    removed = sorted(ended | gone)
    there = set(previous.members)
    added = [member for member in plan.members if member not in there or member.worker in ended]
    if _merge_members(previous.members, removed, added) == plan.members:
        return removed, added
    # Another order than the delta can express: all leave and come again.
    return sorted(previous.ids | ended), list(plan.members)


def _merge_members(
    before: Sequence[Member], removed: Iterable[WorkerId], added: Iterable[Member]
) -> tuple[Member, ...]:
    merged = {member.worker: member for member in before}
    for worker in removed:
        merged.pop(worker, None)
    merged.update((member.worker, member) for member in added)
    return tuple(merged.values())


def _apply_members(previous: Plan | None, delta: control_pb2.PlanDelta) -> tuple[Member, ...]:
    checks.entries("PlanDelta.members_added", delta.members_added)
    checks.entries("PlanDelta.members_removed", delta.members_removed)
    added = [_decode_member(member) for member in delta.members_added]
    checks.distinct("PlanDelta.members_added", [member.worker for member in added])
    before = () if previous is None else previous.members
    return _merge_members(before, map(WorkerId, delta.members_removed), added)


def _decode_callers(delta: control_pb2.PlanDelta, members: Sequence[Member]) -> tuple[WorkerId, ...]:
    checks.entries("PlanDelta.callers", delta.callers, MAX_CALLERS)
    checks.distinct("PlanDelta.callers", delta.callers)
    there = {member.worker for member in members}
    for worker in delta.callers:
        if worker not in there:
            raise checks.refuse("PlanDelta.callers", worker, "a member of the plan")
    return tuple(map(WorkerId, delta.callers))


def _encode_member(member: Member) -> control_pb2.Member:
    return control_pb2.Member(
        worker=member.worker,
        node=member.node,
        local_index=member.local_index,
        incarnation=member.incarnation,
        address=member.address,
    )


def _decode_member(member: control_pb2.Member) -> Member:
    return Member(
        worker=WorkerId(member.worker),
        node=NodeId(checks.name("Member.node", member.node)),
        local_index=member.local_index,
        incarnation=member.incarnation,
        address=decode_address("Member.address", member.address),
    )


def decode_address(field: str, address: str) -> str:
    """`address` where it is empty, "unix:PATH" or "tcp:HOST:PORT". Raises ProtocolError that names `field`."""
    checks.text(field, address, checks.MAX_NAME)
    kind, _, rest = address.partition(":")
    if address and (kind not in _ADDRESS_KINDS or not rest):
        raise checks.refuse(field, address, '"unix:PATH" or "tcp:HOST:PORT"')
    return address


def _hosting_kept(previous: Plan | None, removed: Iterable[WorkerId]) -> dict[WorkerId, tuple[Layer, ...]]:
    kept = {} if previous is None else dict(previous.hosting)
    for worker in removed:
        kept.pop(worker, None)
    return kept


def _apply_hosting(previous: Plan | None, delta: control_pb2.PlanDelta) -> Mapping[WorkerId, tuple[Layer, ...]]:
    checks.entries("PlanDelta.hosting", delta.hosting)
    checks.distinct("PlanDelta.hosting", [entry.worker for entry in delta.hosting])
    hosting = _hosting_kept(previous, map(WorkerId, delta.members_removed))
    for entry in delta.hosting:
        hosting[WorkerId(entry.worker)] = decode_layers("Hosting.layers", entry.layers)
    return hosting


def decode_layers(field: str, layers: Sequence[int]) -> tuple[Layer, ...]:
    """Distinct layers of one model. Raises ProtocolError that names `field`."""
    checks.entries(field, layers, checks.MAX_LAYERS)
    checks.distinct(field, layers)
    return tuple(Layer(checks.number(field, layer, 0, checks.MAX_LAYERS - 1)) for layer in layers)


# ------------------------------------------------------------------ routes


def _base_routes(previous: Plan | None, first_step: int) -> tuple[Route, ...]:
    """Routes that a delta for the table of `first_step` starts from."""
    if previous is None or not previous.tables:
        return ()
    same = (table for table in previous.tables if table.first_step == first_step)
    return next(same, previous.tables[-1]).routes


def _table_changes(previous: Plan | None, plan: Plan) -> Iterable[control_pb2.RouteTable]:
    for table in plan.tables:
        base = _base_routes(previous, table.first_step)
        if len(table.routes) < len(base):
            raise InvariantError(f"plan {plan.epoch} has routes for {len(table.routes)} micro-batches, not {len(base)}")
        changed = [
            control_pb2.Route(micro_batch=index, hops=map(_encode_hop, route))
            for index, route in enumerate(table.routes)
            if index >= len(base) or base[index] != route
        ]
        if changed:
            yield control_pb2.RouteTable(first_step=table.first_step, routes=changed)


def _apply_tables(previous: Plan | None, delta: control_pb2.PlanDelta) -> tuple[RouteTable, ...]:
    checks.entries("PlanDelta.first_steps", delta.first_steps)
    steps = [checks.number("PlanDelta.first_steps", step, 0, checks.MAX_STEP) for step in delta.first_steps]
    if steps != sorted(set(steps)):
        raise checks.refuse("PlanDelta.first_steps", steps, "ascending")
    named = [table.first_step for table in delta.tables]
    checks.distinct("PlanDelta.tables", named)
    if unknown := sorted(set(named).difference(steps)):
        raise checks.refuse("RouteTable.first_step", unknown[0], "one of PlanDelta.first_steps")
    changes = {table.first_step: table for table in delta.tables}
    return tuple(
        RouteTable(
            first_step=Step(step),
            routes=_apply_routes(_base_routes(previous, step), changes.get(step), delta.epoch),
        )
        for step in steps
    )


def _apply_routes(base: tuple[Route, ...], change: control_pb2.RouteTable | None, epoch: int) -> tuple[Route, ...]:
    if change is None:
        return base
    checks.entries("RouteTable.routes", change.routes, checks.MAX_MICRO_BATCHES)
    checks.distinct("RouteTable.routes", [route.micro_batch for route in change.routes])
    routes = dict(enumerate(base))
    for route in change.routes:
        index = checks.number("Route.micro_batch", route.micro_batch, 0, checks.MAX_MICRO_BATCHES - 1)
        routes[MicroBatch(index)] = _decode_route(route.hops, epoch)
    merged = _without_holes("RouteTable.routes", routes)
    ends = {route[-1].last for route in merged}
    if len(ends) > 1:
        raise checks.refuse("Hop.last", sorted(ends), "the same at the end of every route")
    return merged


def _decode_route(hops: Sequence[control_pb2.Hop], epoch: int) -> Route:
    checks.entries("Route.hops", hops, checks.MAX_LAYERS)
    if not hops:
        raise checks.refuse("the number of Route.hops", 0, "at least 1")
    route = tuple(_decode_hop(hop, epoch) for hop in hops)
    reached = 0
    for hop in route:
        if hop.first != reached:
            raise checks.refuse("Hop.first", hop.first, f"{reached}, where the hop before ends")
        reached = hop.last
    return route


def _encode_hop(hop: Hop) -> control_pb2.Hop:
    return control_pb2.Hop(worker=hop.worker, epoch=hop.epoch, first=hop.first, last=hop.last)


def _decode_hop(hop: control_pb2.Hop, epoch: int) -> Hop:
    return Hop(
        worker=WorkerId(hop.worker),
        epoch=Epoch(checks.number("Hop.epoch", hop.epoch, 0, epoch)),
        first=Layer(hop.first),
        last=Layer(checks.number("Hop.last", hop.last, hop.first + 1, checks.MAX_LAYERS)),
    )


# ------------------------------------------------------------------ copies


def _group_changes(previous: Plan | None, plan: Plan) -> list[control_pb2.Group]:
    base = () if previous is None else previous.groups
    if len(plan.groups) < len(base):
        raise InvariantError(f"plan {plan.epoch} has {len(plan.groups)} shards, not {len(base)}: shards are fixed")
    return [
        _encode_group(ShardId(shard), group)
        for shard, group in enumerate(plan.groups)
        if shard >= len(base) or base[shard] != group
    ]


def _apply_groups(previous: Plan | None, delta: control_pb2.PlanDelta) -> tuple[Group, ...]:
    checks.entries("PlanDelta.groups", delta.groups)
    checks.distinct("PlanDelta.groups", [group.shard for group in delta.groups])
    groups = {} if previous is None else dict(enumerate(previous.groups))
    groups.update((group.shard, _decode_group(group)) for group in delta.groups)
    return _without_holes("PlanDelta.groups", groups)


def _encode_group(shard: ShardId, group: Group) -> control_pb2.Group:
    return control_pb2.Group(
        shard=shard,
        owner=group.owner,
        replicas=group.replicas,
        joining=group.joining,
        catch_up=group.catch_up,
    )


def _decode_group(group: control_pb2.Group) -> Group:
    for field, copies in (("replicas", group.replicas), ("joining", group.joining), ("catch_up", group.catch_up)):
        checks.entries(f"Group.{field}", copies)
    decoded = Group(
        owner=WorkerId(group.owner) if group.HasField("owner") else None,
        replicas=tuple(map(WorkerId, group.replicas)),
        joining=tuple(map(WorkerId, group.joining)),
        catch_up=tuple(map(WorkerId, group.catch_up)),
    )
    checks.distinct("Group", decoded.everyone)
    return decoded


def _epoch_changes(before: Mapping[ShardId, Epoch], after: Mapping[ShardId, Epoch]) -> Iterable[control_pb2.ShardEpoch]:
    """Epoch 0 takes a shard off the list; no plan can have lost an owner or let a copy gate before the first one."""
    for shard in sorted(before.keys() | after.keys()):
        epoch = after.get(shard, Epoch(0))
        if shard in after and epoch < 1:
            raise InvariantError(f"shard {shard} has a query or gate of epoch {epoch}: it must be 1 or later")
        if before.get(shard) != after.get(shard):
            yield control_pb2.ShardEpoch(shard=shard, epoch=epoch)


def _apply_epochs(
    field: str, before: Mapping[ShardId, Epoch], changes: Sequence[control_pb2.ShardEpoch], epoch: Epoch
) -> dict[ShardId, Epoch]:
    checks.entries(field, changes)
    checks.distinct(field, [change.shard for change in changes])
    after = dict(before)
    for change in changes:
        if checks.number(f"{field}.epoch", change.epoch, 0, epoch):
            after[ShardId(change.shard)] = Epoch(change.epoch)
        else:
            after.pop(ShardId(change.shard), None)
    return after


# ------------------------------------------------------------------ reduce plans


def _reduce_changes(previous: Plan | None, plan: Plan) -> Iterable[control_pb2.ReducePlan]:
    before = {} if previous is None else previous.reduce_plans
    if gone := sorted(before.keys() - plan.reduce_plans.keys()):
        raise InvariantError(f"plan {plan.epoch} has no reduce plan for layer {gone[0]}: name it as direct")
    for layer, found in sorted(plan.reduce_plans.items()):
        if before.get(layer) != found:
            yield control_pb2.ReducePlan(
                layer=layer, kind=found.kind, order=found.order, epoch=found.epoch, first_step=found.first_step
            )


def _apply_reduce_plans(previous: Plan | None, delta: control_pb2.PlanDelta) -> dict[Layer, ReducePlan]:
    checks.entries("PlanDelta.reduce_plans", delta.reduce_plans, checks.MAX_LAYERS)
    layers = decode_layers("PlanDelta.reduce_plans", [change.layer for change in delta.reduce_plans])
    after = {} if previous is None else dict(previous.reduce_plans)
    after.update(
        (layer, _decode_reduce_plan(change, delta.epoch))
        for layer, change in zip(layers, delta.reduce_plans, strict=True)
    )
    return after


def _decode_reduce_plan(change: control_pb2.ReducePlan, epoch: int) -> ReducePlan:
    checks.entries("ReducePlan.order", change.order)
    checks.distinct("ReducePlan.order", change.order)
    kind: ReduceKind = "ring" if checks.one_of("ReducePlan.kind", change.kind, REDUCE_KINDS) == "ring" else "direct"
    if bool(change.order) != (kind == "ring"):
        raise checks.refuse("ReducePlan.order", list(change.order), f"what {kind} needs: hosts for ring only")
    return ReducePlan(
        kind=kind,
        order=tuple(map(WorkerId, change.order)),
        epoch=Epoch(checks.number("ReducePlan.epoch", change.epoch, 0, epoch)),
        first_step=Step(checks.number("ReducePlan.first_step", change.first_step, 0, checks.MAX_STEP)),
    )


def _without_holes(field: str, found: Mapping[int, _Item]) -> tuple[_Item, ...]:
    missing = next((index for index in range(len(found)) if index not in found), None)
    if missing is not None:
        raise ProtocolError(f"{field} lacks entry {missing} of {len(found)}: send the whole plan first")
    return tuple(found[index] for index in range(len(found)))
