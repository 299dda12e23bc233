"""What every plan of a job is made from besides the plan before it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

from elaswave.core.ids import Epoch, Layer, ShardId, Step, WorkerId
from elaswave.core.layout import Stage
from elaswave.core.plan import Group, Member, Plan, RouteTable
from elaswave.core.reduce_plan import ReduceKind
from elaswave.core.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningContext:
    """Model, stages of the layout, replicas wanted per shard, micro-batches per step, how sums are reduced."""

    shape: ModelShape
    stages: tuple[Stage, ...]
    replicas: int
    micro_batches: int
    reduce: ReduceKind = "direct"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberReport:
    """Newest report of one member: epoch adopted, step, and its step when it adopted each epoch."""

    epoch: Epoch
    step: Step
    adopted_at: Mapping[Epoch, Step]
    versions: Mapping[int, int]
    reduced: Mapping[int, tuple[Step, ...]]
    hosted_ready: bool = False
    finished: bool = False


Reports = Mapping[WorkerId, MemberReport]


class PlanChanges(TypedDict, total=False):
    """Fields of Plan that the next plan may change."""

    members: tuple[Member, ...]
    hosting: Mapping[WorkerId, tuple[Layer, ...]]
    tables: tuple[RouteTable, ...]
    groups: tuple[Group, ...]
    queries: Mapping[ShardId, Epoch]
    gates: Mapping[ShardId, Epoch]
    callers: tuple[WorkerId, ...]
    finished: bool


def supersede(plan: Plan, reason: str, **changes: Unpack[PlanChanges]) -> Plan:
    """The plan of the next epoch with these fields changed."""
    return replace(plan, epoch=Epoch(plan.epoch + 1), reason=reason, **changes)


def prune_tables(tables: tuple[RouteTable, ...], slowest: Step) -> tuple[RouteTable, ...]:
    """Drop route tables that no worker at step `slowest` or later uses."""
    first = 0
    for index, table in enumerate(tables):
        if table.first_step <= slowest:
            first = index
    return tables[first:]
