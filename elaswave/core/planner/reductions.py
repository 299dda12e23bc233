"""Reduce plans of the next plan: layers that it changes get a new ring, from a later step on (rule 3.12)."""

from dataclasses import replace

from elaswave.core.ids import Layer, ShardId, Step
from elaswave.core.plan import Plan
from elaswave.core.planner.context import PlanningContext
from elaswave.core.reduce_plan import make_reduce_plan


def with_reduce_plans(context: PlanningContext, before: Plan | None, plan: Plan, fastest: Step) -> Plan:
    """`plan` with reduce plans of its own epoch for all layers that it changes, and those of `before` for the others.

    Changed: hosts, routes, or the owner of a shard. The first plan is used from its first step on; later ones from the
    step after `fastest`, the highest one reported. A worker may be past that: it starts the ring anew.
    """
    if context.reduce == "direct":
        return plan
    first_step = plan.tables[0].first_step if before is None else Step(fastest + 1)
    kept = {} if before is None else dict(before.reduce_plans)
    node_of = {member.worker: member.node for member in plan.members}
    for layer in changed_layers(context, before, plan):
        hosts = {worker: node_of[worker] for worker in plan.hosts_of_layer.get(layer, ())}
        kept[layer] = make_reduce_plan(context.reduce, hosts, epoch=plan.epoch, first_step=first_step)
    return replace(plan, reduce_plans=kept)


def changed_layers(context: PlanningContext, before: Plan | None, plan: Plan) -> list[Layer]:
    """Layers whose hosts, routes at any step or owners of shards are not those of `before`; without it, all."""
    layers = [Layer(layer) for layer in range(context.shape.layers)]
    if before is None:
        return layers
    changed = {layer for layer in layers if before.hosts_of_layer.get(layer) != plan.hosts_of_layer.get(layer)}
    for index, (was, now) in enumerate(zip(before.groups, plan.groups, strict=True)):
        if was.owner != now.owner:
            changed.update(context.shape.layers_of_shard(ShardId(index)))
    for step in {table.first_step for table in (*before.tables, *plan.tables)}:
        changed |= _rerouted_layers(before, plan, max(step, plan.tables[0].first_step))
    return sorted(changed)


def _rerouted_layers(before: Plan, plan: Plan, step: Step) -> set[Layer]:
    found: set[Layer] = set()
    for was, now in zip(before.table(step).routes, plan.table(step).routes, strict=True):
        for hop in () if was == now else set(was) ^ set(now):
            found.update(Layer(layer) for layer in range(hop.first, hop.last))
    return found
