"""Exploration of a world: every action that can happen, random walks by seed, exhaustive search for small scenes."""

import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from elaswave.core.ids import ShardId, Step, WorkerId
from elaswave.core.planner.context import Reports, supersede
from elaswave.core.planner.copies import StateIsGone, advance_copies, resolve_queries
from elaswave.core.planner.join import may_bring, may_return, plan_join, plan_routes
from elaswave.core.planner.loss import plan_loss
from elaswave.core.protocol.worker import StepProtocol
from elaswave.sim.scene import Scene
from elaswave.sim.shell import Violation
from elaswave.sim.world import Action, World

MAX_ACTIONS = 5000
_SHOWN_ACTIONS = 60


# ---------------------------------------------------------------------- what can happen


def forced_actions(world: World) -> list[Action]:
    """What must happen eventually: deliveries, work, adoptions, reports, what the controller owes."""
    if world.over:
        return []
    found = [Action("deliver", link) for link in world.net]
    found += [Action("lose", link) for link in world.net if link[0] in world.down]
    for index in range(world.scene.workers + world.scene.spares):
        if not world.up(index):
            continue
        if world.next_plan(index) is not None:
            found.append(Action("adopt", (index,)))
        shell = world.workers.get(index)
        if shell is None:
            continue
        if world.ready_hops(index):
            found.append(Action("hop", (index,)))
        if shell.ready_replays():
            found.append(Action("replay", (index,)))
        found += [Action("resync", (index, peer)) for peer in sorted(shell.broken)]
        if world.has_news(index):
            if world.scene.late_reports:
                found.append(Action("hear", (index,)))
            else:
                world.hear(index)
    if world.owed[0] != world.version:
        world.owed = (world.version, _controller_actions(world))
    return found + world.owed[1]


def _controller_actions(world: World) -> list[Action]:
    plan = world.plan
    if plan.finished:
        return []
    dead = [index for index in world.members() if index in world.down]
    if dead:
        return [Action("detect", (index,)) for index in dead]
    reports = _reports(world)
    found: list[Action] = []
    done = (reports.get(worker) for worker in plan.ids)
    if all(report is not None and report.finished and report.epoch == plan.epoch for report in done):
        found.append(Action("finish"))
    answer = resolve_queries(world.context, plan, reports)
    if answer is not None:
        if not (isinstance(answer, StateIsGone) and _may_be_brought(world, answer)):
            found.append(Action("facts"))
    elif advance_copies(world.context, plan, reports, world.swaps) is not None:
        found.append(Action("copies"))
    found += [Action("admit", (index,)) for index in _warm(world)]
    if not plan.queries and world.uneven and _joined(world):
        found.append(Action("routes", (1,)))
    return found


def _reports(world: World) -> Reports:
    return {worker: world.reports[worker] for worker in world.plan.ids if worker in world.reports}


def _warm(world: World) -> Iterable[int]:
    """Live workers that the plan does not count on and that may come in: suspects come back, spares fill gaps."""
    for index in range(world.scene.workers + world.scene.spares):
        if not world.up(index) or index in world.plan.ids:
            continue
        if index not in world.workers:
            if not world.plan.queries and len(world.plan.ids) < world.scene.workers:
                yield index
        elif may_return(world.plan, world.reports, WorkerId(index), _fastest(world)):
            yield index


def _may_be_brought(world: World, gone: StateIsGone) -> bool:
    outside = [WorkerId(index) for index in world.workers if world.up(index) and index not in world.plan.ids]
    return any(may_bring(world.plan, world.reports, worker, gone.shards, _fastest(world)) for worker in outside)


def _fastest(world: World) -> Step:
    return max(world.step_known(index) for index in world.plan.ids)


def _joined(world: World) -> bool:
    """All who were let in have everything that they host."""
    for index in world.joining & world.plan.ids:
        report = world.reports.get(WorkerId(index))
        if report is None or not report.hosted_ready or report.epoch != world.plan.epoch:
            return False
    return True


def hostile_actions(world: World) -> list[Action]:
    """What may happen while budgets last: crashes, suspicions of live workers, planned swaps of owners, cut links."""
    plan, budget = world.plan, world.budget
    if world.over or plan.finished:
        return []
    up = [index for index in range(world.scene.workers + world.scene.spares) if world.up(index)]
    found: list[Action] = []
    if budget.crashes:
        found += [Action("crash", (index,)) for index in up]
    if budget.suspicions and len(plan.ids) > 1:
        found += [Action("suspect", (index,)) for index in up if index in plan.ids]
    if budget.swaps and not world.swaps:
        for shard, group in enumerate(plan.groups):
            if group.owner is not None:
                found += [Action("swap", (shard, w)) for w in world.members() if w not in group.everyone]
    if budget.cuts:
        found += [Action("cut", (one, other)) for one in up for other in up if one < other]
    return found


# ---------------------------------------------------------------------- what an action does


def act(world: World, action: Action) -> None:
    """Perform one action. Raises Violation."""
    args = action.args
    match action.name:
        case "deliver":
            world.deliver(args[0], args[1])
        case "hop":
            world.run_hop(args[0], args[1] if len(args) > 1 else 0)
        case "adopt":
            world.adopt(args[0])
        case "replay":
            world.replay(args[0])
        case "hear":
            world.hear(args[0])
        case "lose":
            world.lose(args[0], args[1])
        case "resync":
            world.resync(args[0], args[1])
        case "crash":
            world.budget = replace(world.budget, crashes=world.budget.crashes - 1)
            world.crash(args[0])
        case "cut":
            world.budget = replace(world.budget, cuts=world.budget.cuts - 1)
            world.cut(args[0], args[1])
        case "suspect":
            world.budget = replace(world.budget, suspicions=world.budget.suspicions - 1)
            _exclude(world, args[0])
        case "detect":
            _exclude(world, args[0])
        case "swap":
            _add_swap(world, ShardId(args[0]), WorkerId(args[1]))
        case _:
            _controller_act(world, action)


def _exclude(world: World, index: int) -> None:
    world.ever_excluded |= {index}
    lost = frozenset((WorkerId(index),))
    if not world.plan.ids - lost:
        world.over = "nobody left"
        return
    world.push(plan_loss(world.context, world.plan, lost, _slowest(world), f"lost {index}"))
    world.swaps = frozenset(swap for swap in world.swaps if swap[1] != index)
    world.joining -= {index}
    world.uneven = True
    world.reports.pop(WorkerId(index), None)


def _slowest(world: World) -> Step:
    return min(world.step_known(index) for index in world.plan.ids)


def _add_swap(world: World, shard: ShardId, worker: WorkerId) -> None:
    world.budget = replace(world.budget, swaps=world.budget.swaps - 1)
    groups = list(world.plan.groups)
    groups[shard] = replace(groups[shard], catch_up=(*groups[shard].catch_up, worker))
    world.swaps = frozenset(((shard, worker),))
    world.push(supersede(world.plan, "swap", groups=tuple(groups)))


def _controller_act(world: World, action: Action) -> None:
    plan, reports = world.plan, _reports(world)
    match action.name:
        case "finish":
            world.push(supersede(plan, "finished", finished=True))
        case "copies":
            made = advance_copies(world.context, plan, reports, world.swaps)
            if made is not None:
                world.push(made)
                world.swaps = frozenset(
                    (shard, worker)
                    for shard, worker in world.swaps
                    if worker in made.groups[shard].everyone and made.groups[shard].owner != worker
                )
        case "facts":
            answer = resolve_queries(world.context, plan, reports)
            if isinstance(answer, StateIsGone):
                world.over = "fall back"
            elif answer is not None:
                world.push(answer)
        case "admit":
            _admit(world, action.args[0])
        case "routes":
            _deal_evenly(world, lead=action.args[0])
        case _:
            raise Violation(f"nobody can {action}")
    world.seen |= {action.name}


def _admit(world: World, index: int) -> None:
    """Let a worker in, as a joiner. What it reported as a suspect does not count for what it holds now."""
    joined = plan_join(world.context, world.plan, (world.scene.member(WorkerId(index)),), f"w{index} joins")
    world.push(joined.plan)
    world.reports.pop(WorkerId(index), None)
    world.swaps |= joined.swaps
    world.joining |= {index}
    world.uneven = True


def _deal_evenly(world: World, lead: int) -> None:
    """Announce even routes, `lead` steps ahead of the highest step known."""
    first_step = Step(_fastest(world) + lead)
    world.version += 1
    world.uneven = False
    world.joining = frozenset()
    if first_step < world.scene.steps:
        world.push(plan_routes(world.context, world.plan, first_step, _slowest(world), "routes"))
        world.evened = True


# ---------------------------------------------------------------------- ends


def check_end(world: World) -> None:
    """Nothing must happen any more: every member is at the last version with every hosted parameter."""
    if world.over:
        return
    for index in world.members():
        shell = world.workers.get(index)
        if shell is None or shell.protocol.step != world.scene.steps or not shell.left:
            at = "not begun" if shell is None else f"at step {shell.protocol.step}, left: {shell.left}"
            raise Violation(f"waits for ever: w{index} {at}")
        for layer in world.plan.hosting.get(WorkerId(index), ()):
            for shard in world.context.shape.shards_of_layer[layer]:
                if len(shell.parameters.get(shard, ())) != world.scene.steps:
                    raise Violation(f"w{index} hosts layer {layer} below the last version")


def check_redundancy(world: World) -> None:
    """Nothing is left to do but to finish: every shard has its replicas, none is still on its way."""
    wanted = min(world.scene.replicas + 1, len(world.plan.ids))
    for shard, group in enumerate(world.plan.groups):
        if group.joining or group.catch_up or len(group.confirmed) < wanted:
            raise Violation(f"redundancy is never restored: shard {shard} has {group}, gates {world.plan.gates}")


# ---------------------------------------------------------------------- random walks


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkResult:
    """One random run."""

    actions: int
    over: str | None
    seen: frozenset[str]
    redone: int


class _Chooser:
    """Chooses actions at random, each walk with its own preferences: some workers, links or kinds are slow."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.rng = random.Random(seed)
        self.hostility = self.rng.choice((0.01, 0.01, 0.03, 0.03, 0.08, 0.2))
        count = scene.workers + scene.spares
        self.speed = [self.rng.choice((1.0, 1.0, 1.0, 0.1, 0.02)) for _ in range(count)]
        control = self.rng.choice((1.0, 1.0, 0.2, 0.05))
        self.kinds = dict.fromkeys(("detect", "finish", "facts", "copies", "admit", "routes"), control)
        self.kinds["hop"] = self.rng.choice((1.0, 1.0, 0.2))
        self.kinds["adopt"] = self.rng.choice((1.0, 1.0, 0.1))
        self.kinds["hear"] = self.rng.choice((1.0, 0.2, 0.05))
        self.kinds["resync"] = self.rng.choice((1.0, 0.2, 0.05))

    def choose(self, world: World, forced: Sequence[Action]) -> Action:
        """The next action."""
        if self.rng.random() < self.hostility:
            hostile = hostile_actions(world)
            if hostile:
                return self.rng.choice(hostile)
        patient = [action for action in forced if action.name != "finish"] or forced
        action = self.rng.choices(patient, [self._weight(action) for action in patient])[0]
        if action.name == "hop":
            return Action("hop", (*action.args, self.rng.randrange(len(world.ready_hops(action.args[0])))))
        if action.name == "routes":
            return Action("routes", (self.rng.choice((2, 1, 0)),))
        return action

    def _weight(self, action: Action) -> float:
        weight = self.kinds.get(action.name, 1.0)
        return weight * self.speed[action.args[0]] if action.name in ("deliver", "hop", "adopt", "hear") else weight


def walk(scene: Scene, seed: int, protocol: type[StepProtocol] = StepProtocol, kind: type[World] = World) -> WalkResult:
    """One random run to its end. Raises Violation, with the seed in its message."""
    chooser = _Chooser(scene, seed)
    world = kind(scene, protocol)
    taken: list[Action] = []
    try:
        while len(taken) < MAX_ACTIONS:
            forced = forced_actions(world)
            if not forced:
                check_end(world)
                return WalkResult(actions=len(taken), over=world.over, seen=world.seen, redone=world.redone)
            if forced == [Action("finish")]:
                check_redundancy(world)
            taken.append(chooser.choose(world, forced))
            act(world, taken[-1])
    except Violation as violation:
        raise Violation(f"seed {seed}: {violation}; after {taken[-_SHOWN_ACTIONS:]}") from violation
    raise Violation(f"seed {seed}: no end after {MAX_ACTIONS} actions; last {taken[-_SHOWN_ACTIONS:]}")


# ---------------------------------------------------------------------- exhaustive search


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """Size of an exhaustive search; `complete` unless the limit was hit. `ends`: states where nothing is left to do."""

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
