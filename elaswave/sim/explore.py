"""Exploration of a world: every action that can happen, random walks by seed, exhaustive search for small scenes."""

import random
from collections import deque
from dataclasses import dataclass, replace

from elaswave.core.ids import Epoch, ShardId, Step, WorkerId
from elaswave.core.plan import Member, Plan
from elaswave.core.planner.context import supersede
from elaswave.core.planner.copies import StateIsGone, advance_copies, resolve_queries
from elaswave.core.planner.join import plan_readmission, plan_routes
from elaswave.core.planner.loss import plan_loss
from elaswave.core.protocol.worker import StepProtocol
from elaswave.sim.world import Scene, Violation, World

Action = tuple[object, ...]
MAX_ACTIONS = 5000


def forced_actions(world: World) -> list[Action]:
    """What must happen eventually: deliveries, work, adoptions, reports, what the controller owes."""
    if world.over:
        return []
    found: list[Action] = [("deliver", *link) for link in world.net]
    for index, shell in enumerate(world.workers):
        if not shell.up or shell.left:
            continue
        if world.ready_hops(index):
            found.append(("hop", index))
        if shell.protocol.plan.epoch < world.plan.epoch:
            found.append(("adopt", index))
    return found + _controller_actions(world)


def _controller_actions(world: World) -> list[Action]:
    plan = world.plan
    if plan.finished:
        return []
    dead = [index for index in world.members() if not world.workers[index].up]
    if dead:
        return [("detect", index) for index in dead]
    for index in range(world.scene.workers):
        if world.workers[index].up and not world.workers[index].left:
            world.take_report(index)
    reports = {WorkerId(index): world.reports[WorkerId(index)] for index in world.members()}
    found: list[Action] = []
    if all(report.finished and report.epoch == plan.epoch for report in reports.values()):
        found.append(("finish",))
    if resolve_queries(world.context, plan, reports) is not None:
        found.append(("facts",))
    elif advance_copies(world.context, plan, reports, world.swaps) is not None:
        found.append(("copies",))
    for index, shell in enumerate(world.workers):
        if shell.up and not shell.left and WorkerId(index) not in plan.ids:
            found.append(("readmit", index))
    return found


def hostile_actions(world: World) -> list[Action]:
    """What may happen while budgets last: crashes, suspicions of live workers, planned swaps of owners."""
    plan = world.plan
    if world.over or plan.finished:
        return []
    up = [i for i, shell in enumerate(world.workers) if shell.up and not shell.left]
    found: list[Action] = []
    if world.crashes:
        found += [("crash", index) for index in up]
    if world.suspicions and len(plan.ids) > 1:
        found += [("suspect", index) for index in up if WorkerId(index) in plan.ids]
    if world.swap_budget and not world.swaps:
        for index, group in enumerate(plan.groups):
            if group.owner is not None:
                found += [("swap", index, w) for w in world.members() if w not in group.everyone]
    return found


def act(world: World, action: Action) -> None:
    """Perform one action. Raises Violation."""
    name, args = action[0], [int(str(x)) for x in action[1:]]
    match name:
        case "deliver":
            world.deliver(args[0], args[1])
        case "hop":
            choice = world.ready_hops(args[0])[args[1] if len(args) > 1 else 0]
            world.run_hop(args[0], *choice)
        case "adopt":
            world.adopt(args[0])
        case "crash":
            world.crashes -= 1
            world.crash(args[0])
        case "suspect" | "detect":
            _exclude(world, args[0], suspicion=name == "suspect")
        case "swap":
            _add_swap(world, ShardId(args[0]), WorkerId(args[1]))
        case _:
            _controller_act(world, str(name), args)


def _exclude(world: World, index: int, *, suspicion: bool) -> None:
    if suspicion:
        world.suspicions -= 1
    world.ever_excluded |= {index}
    lost = frozenset((WorkerId(index),))
    if not world.plan.ids - lost:
        world.over = "nobody left"
        return
    slowest = min(world.reports[worker].step for worker in world.plan.ids)
    _push(world, plan_loss(world.context, world.plan, lost, slowest, f"lost {index}"))
    world.swaps = frozenset(swap for swap in world.swaps if swap[1] != index)


def _add_swap(world: World, shard: ShardId, worker: WorkerId) -> None:
    world.swap_budget -= 1
    groups = list(world.plan.groups)
    groups[shard] = replace(groups[shard], catch_up=(*groups[shard].catch_up, worker))
    world.swaps = frozenset(((shard, worker),))
    _push(world, supersede(world.plan, "swap", groups=tuple(groups)))


def _controller_act(world: World, name: str, args: list[int]) -> None:
    plan = world.plan
    reports = {worker: world.reports[worker] for worker in plan.ids}
    match name:
        case "finish":
            _push(world, supersede(plan, "finished", finished=True))
        case "copies":
            made = advance_copies(world.context, plan, reports, world.swaps)
            if made is not None:
                world.seen.add("confirm")
                _push(world, made)
                groups = made.groups
                world.swaps = frozenset(
                    s for s in world.swaps if s[1] in groups[s[0]].everyone and groups[s[0]].owner != s[1]
                )
        case "facts":
            answer = resolve_queries(world.context, plan, reports)
            if isinstance(answer, StateIsGone):
                world.over = "fall back"
            elif answer is not None:
                world.seen.add("facts")
                _push(world, answer)
        case "readmit":
            first = world.scene.plan().member(WorkerId(args[0]))
            if first is not None:
                _readmit(world, first, early=len(args) > 1 and args[1] == 1)


def _readmit(world: World, member: Member, *, early: bool) -> None:
    world.seen |= {"readmit", "routes"}
    joined = plan_readmission(world.context, world.plan, member, f"back {member.worker}")
    _push(world, joined.plan)
    top = max(report.step for report in world.reports.values())
    slowest = min(world.reports[worker].step for worker in world.plan.ids)
    first_step = Step(top + (0 if early else 1))
    _push(world, plan_routes(world.context, world.plan, first_step, slowest, "routes"))


def _push(world: World, plan: Plan) -> None:
    if plan.epoch != Epoch(world.plan.epoch + 1):
        raise Violation(f"plan {plan.epoch} after {world.plan.epoch}")
    world.plans.append(plan)


def check_end(world: World) -> None:
    """Nothing must happen any more: every member is at the last version with every hosted parameter."""
    if world.over:
        return
    for index in world.members():
        shell = world.workers[index]
        if not shell.up:
            continue
        if shell.protocol.step != world.scene.steps or not shell.left:
            raise Violation(f"waits for ever: w{index} at step {shell.protocol.step}, left: {shell.left}")
        for layer in world.plan.hosting.get(WorkerId(index), ()):
            for shard in world.context.shape.shards_of_layer[layer]:
                if len(shell.parameters.get(shard, ())) != world.scene.steps:
                    raise Violation(f"w{index} hosts layer {layer} below the last version")


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkResult:
    """One random run."""

    actions: int
    over: str | None
    seen: frozenset[str]
    redone: int


def walk(scene: Scene, seed: int, protocol: type[StepProtocol] = StepProtocol) -> WalkResult:
    """One random run to its end. Raises Violation, with the seed in its message."""
    rng = random.Random(seed)
    world = World(scene, protocol)
    hostility = rng.choice((0.01, 0.03, 0.08))
    speed = {index: rng.choice((1.0, 1.0, 1.0, 0.1, 0.02)) for index in range(scene.workers)}
    by_kind = {"hop": rng.choice((1, 1, 0.2)), "adopt": rng.choice((1, 1, 0.1))}
    control = rng.choice((1, 1, 0.2, 0.05))
    taken: list[Action] = []
    try:
        for _ in range(MAX_ACTIONS):
            actions = forced_actions(world)
            if not actions:
                check_end(world)
                return WalkResult(actions=len(taken), over=world.over, seen=frozenset(world.seen), redone=world.redone)
            hostile = hostile_actions(world) if rng.random() < hostility else []
            if hostile:
                action = rng.choice(hostile)
            else:
                action = rng.choices(actions, [_weight(a, by_kind, speed, control) for a in actions])[0]
                if action[0] == "hop":
                    action = (*action, rng.randrange(len(world.ready_hops(int(str(action[1]))))))
                elif action[0] == "readmit":
                    action = (*action, rng.choice((0, 0, 1)))
            taken.append(action)
            act(world, action)
    except Violation as violation:
        raise Violation(f"seed {seed}: {violation}; after {taken[-40:]}") from violation
    raise Violation(f"seed {seed}: no end after {MAX_ACTIONS} actions; last {taken[-20:]}")


def _weight(action: Action, by_kind: dict[str, float], speed: dict[int, float], control: float) -> float:
    name = str(action[0])
    if name in ("hop", "adopt"):
        return by_kind[name] * speed[int(str(action[1]))]
    if name == "deliver":
        return speed[int(str(action[1]))]
    return control


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """Size of an exhaustive search; `complete` unless the limit was hit."""

    states: int
    transitions: int
    ends: int
    complete: bool


def search(scene: Scene, *, limit: int, protocol: type[StepProtocol] = StepProtocol) -> SearchResult:
    """Visit every reachable state of a small scene (told apart by 64-bit hash). Raises Violation with the path."""
    first = World(scene, protocol)
    seen = {first.fingerprint()}
    queue: deque[tuple[World, tuple[Action, ...]]] = deque([(first, ())])
    transitions = ends = 0
    while queue and len(seen) < limit:
        world, path = queue.popleft()
        forced = forced_actions(world)
        if not forced:
            check_end(world)
            ends += 1
        for action in forced + hostile_actions(world):
            after = world.clone()
            transitions += 1
            try:
                act(after, action)
            except Violation as violation:
                raise Violation(f"{violation}; after {(*path, action)}") from violation
            mark = after.fingerprint()
            if mark not in seen:
                seen.add(mark)
                queue.append((after, (*path, action)))
    return SearchResult(states=len(seen), transitions=transitions, ends=ends, complete=not queue)
