"""Where copies of optimizer state live: owners among the hosts, replicas in other failure domains, spread evenly."""

from collections.abc import Mapping, Sequence

from elaswave.core.ids import Layer, NodeId, ShardId, WorkerId
from elaswave.core.plan import Group, Member
from elaswave.core.shape import ModelShape
from elaswave.errors import ConfigError


class Placement:
    """Loads of the workers while copies are being placed. Deterministic: ties go to the lower id."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.nodes: dict[WorkerId, NodeId] = {member.worker: member.node for member in members}
        self.owned: dict[WorkerId, int] = dict.fromkeys(self.nodes, 0)
        self.replicated: dict[WorkerId, int] = dict.fromkeys(self.nodes, 0)
        self.pairs: dict[tuple[WorkerId, WorkerId], int] = {}

    def count(self, group: Group, elements: int) -> None:
        """Take an existing group into account."""
        if group.owner is not None:
            self.owned[group.owner] = self.owned.get(group.owner, 0) + elements
        for worker in group.everyone[0 if group.owner is None else 1 :]:
            self._count_replica(group.owner, worker, elements)

    def owner(self, hosts: Sequence[WorkerId], elements: int) -> WorkerId:
        """The host that owns least."""
        chosen = min(hosts, key=lambda worker: (self.owned[worker], worker))
        self.owned[chosen] += elements
        return chosen

    def replica(self, owner: WorkerId, taken: Sequence[WorkerId], elements: int) -> WorkerId | None:
        """A worker outside `taken`: in a failure domain that holds no copy where one exists, then where the owner
        has fewest replicas yet, then the least loaded. None where nobody is left."""
        domains = {self.nodes[worker] for worker in taken if worker in self.nodes}
        free = [worker for worker in self.nodes if worker not in taken]
        if not free:
            return None

        def order(worker: WorkerId) -> tuple[bool, int, int, WorkerId]:
            pair = self.pairs.get((owner, worker), 0)
            return (self.nodes[worker] in domains, pair, self.replicated[worker], worker)

        chosen = min(free, key=order)
        self._count_replica(owner, chosen, elements)
        return chosen

    def _count_replica(self, owner: WorkerId | None, worker: WorkerId, elements: int) -> None:
        self.replicated[worker] = self.replicated.get(worker, 0) + elements
        if owner is not None:
            self.pairs[(owner, worker)] = self.pairs.get((owner, worker), 0) + max(1, elements)


def place_shards(
    shape: ModelShape, members: Sequence[Member], hosts_of_layer: Mapping[Layer, Sequence[WorkerId]], replicas: int
) -> tuple[Group, ...]:
    """Owners and `replicas` further copies of every shard. Raises ConfigError where there are too few workers."""
    if replicas >= len(members) and replicas > 0:
        raise ConfigError(f"--replicas is {replicas} with {len(members)} workers: a shard needs a worker per copy")
    placement = Placement(sorted(members, key=lambda member: member.worker))
    groups: list[Group] = []
    for index, shard in enumerate(shape.shards):
        hosts = sorted({host for layer in shape.layers_of_shard(ShardId(index)) for host in hosts_of_layer[layer]})
        copies = [placement.owner(hosts, shard.elements)]
        for _ in range(replicas):
            found = placement.replica(copies[0], copies, shard.elements)
            if found is not None:
                copies.append(found)
        groups.append(Group(owner=copies[0], replicas=tuple(copies[1:])))
    return tuple(groups)
