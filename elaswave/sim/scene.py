"""Scenes: the small jobs that are explored, and how much harm may be done in them."""

from dataclasses import dataclass

from elaswave.core.ids import BlockId, Epoch, Layer, NodeId, Step, WorkerId
from elaswave.core.layout import Stage
from elaswave.core.plan import Group, Member, Plan, RouteTable
from elaswave.core.reduce_plan import ReduceKind
from elaswave.core.routes import balanced_routes
from elaswave.core.shape import CHUNK_ELEMENTS, Block, ModelShape, Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Start of a run. `hosts` per layer; `copies` per shard: (layers that it belongs to, owner, replicas).

    Each layer is a stage unless `stage_ends` says where stages end; layers of one stage have the same hosts.
    `crashes`, `suspicions` (of workers that are alive), `swaps` (planned changes of an owner) and `cuts` (links between
    live workers that lose what is in flight) are how often each may happen. `spares` wait to take the place of lost
    workers. With `late_reports` the controller learns of a worker's progress at any later time, else at once.
    `log_cap`: values that a boundary log may keep; None: all. `reduce`: how partial sums get to owners.
    """

    workers: int
    hosts: tuple[tuple[int, ...], ...]
    copies: tuple[tuple[tuple[int, ...], int, tuple[int, ...]], ...]
    micro_batches: int = 2
    steps: int = 1
    replicas: int = 1
    stage_ends: tuple[int, ...] | None = None
    spares: int = 0
    crashes: int = 1
    suspicions: int = 0
    swaps: int = 0
    cuts: int = 0
    late_reports: bool = False
    log_cap: int | None = None
    reduce: ReduceKind = "direct"

    def shape(self) -> ModelShape:
        """One block per distinct set of layers, divided into as many shards as `copies` names for it."""
        layer_sets = list(dict.fromkeys(layers for layers, _, _ in self.copies))
        counts = {layers: sum(found == layers for found, _, _ in self.copies) for layers in layer_sets}
        blocks = tuple(
            Block(layers=tuple(Layer(x) for x in layers), elements=counts[layers] * CHUNK_ELEMENTS)
            for layers in layer_sets
        )
        seen = dict.fromkeys(layer_sets, 0)
        shards: list[Shard] = []
        for layers, _, _ in self.copies:
            start = seen[layers] * CHUNK_ELEMENTS
            seen[layers] += 1
            shards.append(Shard(block=BlockId(layer_sets.index(layers)), start=start, stop=start + CHUNK_ELEMENTS))
        return ModelShape(len(self.hosts), blocks, tuple(shards))

    def stages(self) -> tuple[Stage, ...]:
        """Stages in order."""
        ends = self.stage_ends or tuple(range(1, len(self.hosts) + 1))
        starts = (0, *ends[:-1])
        return tuple(Stage(first=Layer(a), last=Layer(b)) for a, b in zip(starts, ends, strict=True))

    def member(self, worker: WorkerId) -> Member:
        """Every worker is a node of its own."""
        return Member(worker=worker, node=NodeId(f"n{worker}"), local_index=0, incarnation=0)

    def plan(self) -> Plan:
        """The plan of epoch 1."""
        hosting: dict[WorkerId, tuple[Layer, ...]] = {WorkerId(w): () for w in range(self.workers)}
        for layer, hosts in enumerate(self.hosts):
            for host in hosts:
                hosting[WorkerId(host)] = (*hosting[WorkerId(host)], Layer(layer))
        by_stage = [tuple(WorkerId(w) for w in self.hosts[stage.first]) for stage in self.stages()]
        groups = tuple(
            Group(owner=WorkerId(owner), replicas=tuple(WorkerId(w) for w in replicas))
            for _, owner, replicas in self.copies
        )
        routes = balanced_routes(self.stages(), by_stage, self.micro_batches, Epoch(1))
        members = tuple(self.member(WorkerId(w)) for w in range(self.workers))
        table = RouteTable(first_step=Step(0), routes=routes)
        return Plan(epoch=Epoch(1), reason="start", members=members, hosting=hosting, tables=(table,), groups=groups)
