"""Reduce plans: the ways of a layer's partial sums to the owners of its shards (docs/adr/0011-reduce-plans.md)."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Final, Literal

from elaswave.core.ids import Epoch, NodeId, ShardId, Step, WorkerId

ReduceKind = Literal["direct", "ring"]
REDUCE_KINDS: Final[tuple[ReduceKind, ...]] = ("direct", "ring")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReducePlan:
    """How the sums of one layer are combined.

    direct: every host sends its sums to the owner. ring: each adds its own to what the one before it in `order` sent.
    `epoch` is that of the plan that made it: running sums of another one are not continued. Steps before `first_step`
    are reduced directly.
    """

    kind: ReduceKind = "direct"
    order: tuple[WorkerId, ...] = ()
    epoch: Epoch
    first_step: Step


def make_reduce_plan(
    kind: ReduceKind, hosts: Mapping[WorkerId, NodeId], *, epoch: Epoch, first_step: Step
) -> ReducePlan:
    """The reduce plan of a layer with these hosts and their nodes; in whatever order they are told.

    Hosts of one node follow each other, so that a ring enters and leaves every node once. One host has nobody to
    combine with: direct.
    """
    if kind == "direct" or len(hosts) <= 1:
        return ReducePlan(epoch=epoch, first_step=first_step)
    order = sorted(hosts, key=lambda worker: (hosts[worker], worker))
    return ReducePlan(kind=kind, order=tuple(order), epoch=epoch, first_step=first_step)


def path_to_owner(
    order: tuple[WorkerId, ...], contributors: Set[WorkerId], owner: WorkerId, shard: ShardId
) -> tuple[WorkerId, ...]:
    """Workers that the sums of `shard` go through: `order`, turned so that `owner` is last, without idle ones.

    An owner outside `order` comes after all of it; then the shard's number decides where the turn begins, so that
    shards begin at different hosts.
    """
    last = order.index(owner) if owner in order else shard % len(order)
    turned = order[last + 1 :] + order[: last + 1]
    return (*(worker for worker in turned if worker in contributors and worker != owner), owner)
