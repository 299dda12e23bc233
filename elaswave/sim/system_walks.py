"""Random walks of the whole system: what can happen, what harm may be done, and which ends are good."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from elaswave.core import events as ev
from elaswave.core.controller import Controller
from elaswave.core.ids import NodeId
from elaswave.core.plan import Plan
from elaswave.core.protocol.worker import StepProtocol
from elaswave.sim.shell import Violation
from elaswave.sim.system import System, SystemScene
from elaswave.sim.world import Action

MAX_ACTIONS = 20_000
_SHOWN_ACTIONS = 80


def forced_actions(system: System) -> list[Action]:
    """What must happen eventually."""
    found = [Action("deliver", link) for link in system.net if system.acts(link[1])]
    found += [Action("lose", link) for link in system.net if link[0] in system.down]
    for index, shell in system.workers.items():
        if system.acts(index):
            if system.ready_hops(index):
                found.append(Action("hop", (index,)))
            found += [Action("resync", (index, peer)) for peer in sorted(shell.broken)]
    found += [Action("adopt", (i,)) for i in system.node_of if system.acts(i) and system.next_plan(i) is not None]
    found += [Action("tell", (index,)) for index, events in system.told.items() if events]
    found += [Action("ready", (index,)) for index in system.waiting]
    found += [Action("clear", (index,)) for index in system.suspected]
    found += [Action("die", (index,)) for index in system.fenced]
    found += [Action("tell-node", (place,)) for place in range(len(system.lost_nodes))]
    return found + [Action("attach", (place,)) for place in range(len(system.absent_nodes))]


def hostile_actions(system: System) -> list[Action]:
    """What the budget of harm allows."""
    harm, plan = system.harm, system.plan
    if plan.finished:
        return []
    up = [index for index in system.node_of if system.up(index)]
    found: list[Action] = []
    if harm.crashes:
        found += [Action("kill", (index,)) for index in up if index not in system.waiting]
    if harm.suspicions:
        sound = [i for i in up if i in plan.ids and i in system.workers and i not in system.suspected]
        found += [Action("suspect", (index, stopped)) for index in sound for stopped in (0, 1)]
    if harm.fences and any(record.fence_at is not None for record in system.controller.workers.values()):
        found.append(Action("tick"))
    if harm.cuts:
        begun = [index for index in up if index in system.workers]
        found += [Action("cut", (one, other)) for one in begun for other in begun if one < other]
    if harm.nodes and len({system.node_of[index] for index in plan.ids}) > 1:
        nodes = sorted({system.node_of[index] for index in up})
        found += [Action("lose-node", (int(node[1:]),)) for node in nodes]
    return found


def act(system: System, action: Action) -> None:
    """Perform one action. Raises Violation."""
    args, harm = action.args, system.harm
    match action.name:
        case "deliver" | "hop" | "adopt" | "resync":
            system.work(action)
        case "lose":
            system.lose(args[0], args[1])
        case "tell":
            system.handle(system.told[args[0]].pop(0))
        case "ready":
            system.get_ready(args[0])
        case "clear":
            system.clear(args[0])
        case "die":
            system.kill(args[0])
        case "tell-node":
            node = system.lost_nodes.pop(args[0])
            system.absent_nodes.append(node)
            system.handle(ev.AgentLost(node=node, clean=False, evidence="", noticed_at=system.now))
        case "attach":
            node = system.absent_nodes.pop(args[0])
            system.handle(ev.AgentAttached(node=node, workers=system.scene.config.nproc_per_node))
        case "kill":
            system.harm = replace(harm, crashes=harm.crashes - 1)
            system.kill(args[0])
        case "suspect":
            system.harm = replace(harm, suspicions=harm.suspicions - 1)
            system.suspect(args[0], stopped=bool(args[1]))
        case "tick":
            system.harm = replace(harm, fences=harm.fences - 1)
            system.tick()
        case "cut":
            system.harm = replace(harm, cuts=harm.cuts - 1)
            system.cut(args[0], args[1])
        case "lose-node":
            system.harm = replace(harm, nodes=harm.nodes - 1)
            system.lose_node(NodeId(f"n{args[0]}"))
        case _:
            raise Violation(f"nobody can {action}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemResult:
    """One random run: how it ended, and its last plan."""

    actions: int
    ended: ev.JobEnded | ev.RestartAll
    plan: Plan


def walk_system(
    scene: SystemScene,
    seed: int,
    protocol: type[StepProtocol] = StepProtocol,
    controller: type[Controller] = Controller,
) -> SystemResult:
    """One random run to its end. Raises Violation, with the seed in its message."""
    rng = random.Random(seed)
    system = System(scene, protocol, controller)
    hostility = rng.choice((0.01, 0.03, 0.1))
    weights = {name: rng.choice((1.0, 1.0, 0.1)) for name in ("hop", "adopt", "tell", "ready", "clear", "deliver")}
    slow = {index: rng.choice((1.0, 1.0, 0.05)) for index in range(64)}
    taken: list[Action] = []
    try:
        while system.ended is None and len(taken) < MAX_ACTIONS:
            taken.append(_choose(system, rng, hostility, weights, slow))
            act(system, taken[-1])
        if system.ended is None:
            raise Violation(f"no end after {MAX_ACTIONS} actions")
        _check_end(system)
    except Violation as violation:
        raise Violation(f"seed {seed}: {violation}; after {taken[-_SHOWN_ACTIONS:]}") from violation
    return SystemResult(actions=len(taken), ended=system.ended, plan=system.plan)


def _choose(
    system: System, rng: random.Random, hostility: float, weights: dict[str, float], slow: dict[int, float]
) -> Action:
    hostile: Sequence[Action] = hostile_actions(system) if rng.random() < hostility else ()
    if hostile:
        return rng.choice(hostile)
    forced = forced_actions(system)
    if not forced:
        if system.controller.next_deadline() is None:
            where = {index: shell.protocol.step for index, shell in system.workers.items() if system.up(index)}
            raise Violation(f"waits for ever: plan {system.plan}, steps {where}")
        return Action("tick")
    action = rng.choices(forced, [weights.get(found.name, 1.0) * slow[found.args[0]] for found in forced])[0]
    if action.name == "hop":
        return Action("hop", (*action.args, rng.randrange(len(system.ready_hops(action.args[0])))))
    return action


def _check_end(system: System) -> None:
    ended = system.ended
    if not isinstance(ended, ev.JobEnded) or ended.exit_code != 0:
        return
    if not system.plan.finished:
        raise Violation("the job ends well without the plan that says so")
    for index in system.plan.ids - system.down:
        protocol = system.workers[index].protocol
        if protocol.step != system.job.steps or not protocol.finished():
            raise Violation(f"the job ends well and w{index} is at step {protocol.step}")
