"""The plan: who does what from which epoch on. Values only; made by the planner, adopted by workers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from elaswave.core.ids import Epoch, Layer, MicroBatch, NodeId, ShardId, Step, WorkerId
from elaswave.core.reduce_plan import ReducePlan

FIRST_EPOCH = Epoch(1)
"""Epoch of the plan that a job starts with: who is in it starts from initial values or a checkpoint, who comes later
fetches everything from others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A worker that the plan counts on. `address` is where its links listen ("unix:PATH" or "tcp:HOST:PORT")."""

    worker: WorkerId
    node: NodeId
    local_index: int
    incarnation: int
    address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """Layers `first` to `last` (exclusive) of one micro-batch on one worker.

    `epoch` is the assignment epoch: the plan that gave the hop to this worker. Hops of one
    (step, layer, assignment epoch) share an accumulator, so a plan that takes one of them from a live worker
    gives new epochs to all of them (protocol rule 3.2).
    """

    worker: WorkerId
    epoch: Epoch
    first: Layer
    last: Layer


Route = tuple[Hop, ...]
"""Hops of one micro-batch in order; they cover layers 0 to L - 1 once, without gap or overlap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTable:
    """Routes of all micro-batches from `first_step` on, until a table with a later first step takes over."""

    first_step: Step
    routes: tuple[Route, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Copies of one shard's optimizer state.

    owner: completes the reduction and publishes; None while no confirmed copy is known (protocol rule 5.3).
    replicas: confirmed, gate decisions. joining: gate decisions, not confirmed. catch_up: gate nothing yet.
    """

    owner: WorkerId | None
    replicas: tuple[WorkerId, ...] = ()
    joining: tuple[WorkerId, ...] = ()
    catch_up: tuple[WorkerId, ...] = ()

    @property
    def everyone(self) -> tuple[WorkerId, ...]:
        owner = () if self.owner is None else (self.owner,)
        return owner + self.replicas + self.joining + self.catch_up

    @property
    def gating(self) -> tuple[WorkerId, ...]:
        """Copies without whose "have" no step is decided; meaningless while there is no owner."""
        owner = () if self.owner is None else (self.owner,)
        return owner + self.replicas + self.joining

    @property
    def confirmed(self) -> tuple[WorkerId, ...]:
        owner = () if self.owner is None else (self.owner,)
        return owner + self.replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Complete state of the job's assignments at one epoch. Never edited, only superseded.

    `tables` ascend by first step and the first one starts at or before any step still under way.
    `queries[shard]` is the epoch under which the owner of a shard was lost with no confirmed copy left;
    `gates[shard]` the epoch that made its joining copies gate. `finished` lets workers leave (rule 4.11).
    Layers that `reduce_plans` does not name are reduced directly. `callers`: the member that runs the user's callbacks,
    then the one that holds a copy of their state.
    """

    epoch: Epoch
    reason: str
    members: tuple[Member, ...]
    hosting: Mapping[WorkerId, tuple[Layer, ...]]
    tables: tuple[RouteTable, ...]
    groups: tuple[Group, ...]
    queries: Mapping[ShardId, Epoch] = field(default_factory=dict)
    gates: Mapping[ShardId, Epoch] = field(default_factory=dict)
    reduce_plans: Mapping[Layer, ReducePlan] = field(default_factory=dict)
    callers: tuple[WorkerId, ...] = ()
    finished: bool = False
    ids: frozenset[WorkerId] = field(init=False, compare=False, repr=False)
    hosts_of_layer: Mapping[Layer, tuple[WorkerId, ...]] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", frozenset(member.worker for member in self.members))
        hosts: dict[Layer, list[WorkerId]] = {}
        for worker in sorted(self.hosting):
            for layer in self.hosting[worker]:
                hosts.setdefault(layer, []).append(worker)
        object.__setattr__(self, "hosts_of_layer", {layer: tuple(found) for layer, found in hosts.items()})

    @property
    def caller(self) -> WorkerId | None:
        """Who runs the user's callbacks; None where nobody is left."""
        return self.callers[0] if self.callers else None

    @property
    def keeper(self) -> WorkerId | None:
        """Who holds a copy of the state of the user's callbacks; None where the caller is alone."""
        return self.callers[1] if len(self.callers) > 1 else None

    def table(self, step: Step) -> RouteTable:
        """The routes in force at `step`."""
        best = self.tables[0]
        for table in self.tables[1:]:
            if table.first_step <= step:
                best = table
        return best

    def route(self, step: Step, micro_batch: MicroBatch) -> Route:
        """Hops of one micro-batch at `step`."""
        return self.table(step).routes[micro_batch]

    def member(self, worker: WorkerId) -> Member | None:
        """The member with this id, or None where the plan does not count on it."""
        return next((member for member in self.members if member.worker == worker), None)


def hop_of_layer(route: Route, layer: Layer) -> Hop:
    """The hop of `route` that runs `layer`."""
    return next(hop for hop in route if hop.first <= layer < hop.last)
