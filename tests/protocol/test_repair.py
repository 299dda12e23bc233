"""Repair by need: whatever facts there are and whoever dies, everything counts once and only lost work is redone."""

import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from elaswave.core.ids import Layer, NodeId, WorkerId
from elaswave.core.layout import partition_layers
from elaswave.core.placement import place_shards
from elaswave.core.plan import Member
from elaswave.core.shape import CHUNK_ELEMENTS, Block, ModelShape, divide_into_shards
from elaswave.sim.explore import act, check_end, forced_actions
from elaswave.sim.scene import Scene
from elaswave.sim.world import Action, World

MAX_ACTIONS = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A rectangular job, how many actions come before the deaths, and the seed of all choices."""

    scene: Scene
    actions: int
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any DP x PP of up to 6 workers, copies placed by the planner, one or two replicas, sometimes a tied weight."""
    dp, pp = draw(st.sampled_from([(1, 2), (2, 1), (3, 1), (1, 3), (2, 2), (4, 1), (3, 2), (2, 3)]))
    stages = partition_layers(draw(st.integers(pp, pp + 2)), pp)
    layers = stages[-1].last
    blocks = [Block(layers=(Layer(layer),), elements=dp * CHUNK_ELEMENTS) for layer in range(layers)]
    if layers > 1 and draw(st.booleans()):
        blocks.append(Block(layers=(Layer(0), Layer(layers - 1)), elements=CHUNK_ELEMENTS))
    shape = ModelShape(layers, tuple(blocks), divide_into_shards(tuple(blocks), dp))
    members = [Member(worker=WorkerId(w), node=NodeId(f"n{w}"), local_index=0, incarnation=0) for w in range(dp * pp)]
    hosts = {
        layer: tuple(WorkerId(d * pp + p) for d in range(dp))
        for p, stage in enumerate(stages)
        for layer in stage.layers
    }
    replicas = draw(st.integers(1, min(2, dp * pp - 1)))
    groups = place_shards(shape, members, hosts, replicas)
    copies = tuple(
        (
            tuple(int(x) for x in shape.blocks[shard.block].layers),
            int(group.everyone[0]),
            tuple(map(int, group.replicas)),
        )
        for shard, group in zip(shape.shards, groups, strict=True)
    )
    scene = Scene(
        workers=dp * pp,
        hosts=tuple(tuple(map(int, hosts[Layer(layer)])) for layer in range(layers)),
        stage_ends=tuple(int(stage.last) for stage in stages),
        copies=copies,
        micro_batches=draw(st.integers(dp, 5)),
        steps=draw(st.integers(1, 2)),
        replicas=replicas,
        crashes=0,
    )
    return Case(scene=scene, actions=draw(st.integers(0, 150)), seed=draw(st.integers(0, 2**32)))


class Recorder(World):
    """Remembers every backward hop that was run, and by whom."""

    ran: list[tuple[int, int, int, int, int]]

    def run_hop(self, index: int, place: int) -> None:
        micro_batch, hop, backward = self.ready_hops(index)[place]
        if backward:
            self.ran.append((index, self.workers[index].protocol.step, micro_batch, hop.first, hop.last))
        super().run_hop(index, place)


def run(world: World, rng: random.Random, limit: int) -> None:
    """Random forced actions. Even routes are left out: they redo work by plan, not by need."""
    for _ in range(limit):
        actions = [action for action in forced_actions(world) if action.name != "routes"]
        if not actions:
            return
        action = rng.choice(actions)
        if action.name == "hop":
            action = Action("hop", (action.args[0], rng.randrange(len(world.ready_hops(action.args[0])))))
        act(world, action)
    assert limit < MAX_ACTIONS, "no end"


def doomed(world: World, rng: random.Random) -> list[int]:
    """Random workers whose death leaves a confirmed copy of every shard."""
    chosen: list[int] = []
    up = [index for index in world.members() if world.up(index)]
    for index in rng.sample(up, rng.randint(1, len(up))):
        gone = {*world.down, *chosen, index}
        if all(set(group.confirmed) - gone for group in world.plan.groups):
            chosen.append(index)
    return chosen


@given(cases())
@settings(max_examples=200)
def test_after_any_prefix_of_facts_and_any_deaths_all_counts_once_and_only_lost_hops_are_redone(case: Case) -> None:
    rng = random.Random(case.seed)
    world = Recorder(case.scene)
    world.ran = []
    run(world, rng, case.actions)
    dead = doomed(world, rng) if not world.plan.finished else []
    for index in dead:
        world.crash(index)
    run(world, rng, MAX_ACTIONS)
    assert world.over is None
    # Exactly once: the world refuses any gradient, loss or norm in which something is missing or counted twice.
    check_end(world)
    assert {step for step in world.decisions} == set(range(case.scene.steps))
    # Only what was lost: a hop that was run twice was run by a dead worker first, and never thrice.
    work: dict[tuple[int, ...], list[int]] = {}
    for index, *hop in world.ran:
        work.setdefault(tuple(hop), []).append(index)
    for hop_key, runners in work.items():
        assert len(runners) <= 2, hop_key
        assert len(runners) == 1 or (runners[0] in dead and runners[1] not in dead), (hop_key, runners)


@given(cases(), st.integers(0, 40))
@settings(max_examples=80)
def test_deaths_one_after_the_other_during_the_repair(case: Case, pause: int) -> None:
    rng = random.Random(case.seed)
    world = World(case.scene)
    run(world, rng, case.actions)
    while not world.plan.finished and (dead := doomed(world, rng)[:1]):
        world.crash(dead[0])
        run(world, rng, pause)
    run(world, rng, MAX_ACTIONS)
    assert world.over in (None, "fall back")
    check_end(world)
