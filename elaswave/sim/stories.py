"""Stories: runs of a world that are told line by line, then run to their end. For schedules that chance does not find.

| line | what happens |
|---|---|
| `run` | all that must happen happens, until nothing is left |
| `run but 0>1 adopt2 admit` | the same, but nothing arrives over a link, a worker adopts no plan, nobody is let in |
| `run last 0>1 until w0 at 1` | what is named comes only when nothing else can happen; stops when w0 is at step 1 |
| `0>1 Have` | over this link all arrives up to the first fact of this type |
| `crash 0`, `adopt 2`, `swap 0 1`, `lose 0 1` | this action, also one that the controller would not take yet |

What can be named: a link `0>1`, or `0>1:Have`, which stops at a fact of this type; `hop0` and `adopt0` of a worker;
`detect`, `admit`, `copies`, `facts` and `routes` of the controller. Text behind # is a comment.
"""

import re
from dataclasses import dataclass
from typing import get_args

from elaswave.core.facts import Fact
from elaswave.core.protocol.worker import StepProtocol
from elaswave.sim.explore import MAX_ACTIONS, act, check_end, forced_actions
from elaswave.sim.scene import Scene
from elaswave.sim.shell import Violation
from elaswave.sim.world import Action, World

_FACTS = frozenset(fact.__name__ for fact in get_args(Fact))
_NAME = re.compile(rf"\d+>\d+(:({'|'.join(sorted(_FACTS))}))?|(hop|adopt)\d+|detect|admit|copies|facts|routes")


class Unplayable(Exception):
    """A line of a story cannot happen in its world: correct the story."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """`tells`: what it is about, in one sentence. `lines`: see this module."""

    tells: str
    scene: Scene
    lines: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What a line withholds, what it lets come last, and the worker and step at which it stops."""

    but: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()
    until: tuple[int, int] | None = None


def play(story: Story, protocol: type[StepProtocol] = StepProtocol) -> World:
    """Play the lines, then run to the end: nobody may wait for ever, and no checkpoint may be needed.

    Raises Violation, or Unplayable for a line that cannot happen.
    """
    world = World(story.scene, protocol)
    for line in story.lines.splitlines():
        match line.split("#")[0].split():
            case []:
                pass
            case ["run", *words]:
                _run(world, _clauses(line, words))
            case [link, fact] if ">" in link:
                _deliver(world, line, link, fact)
            case ["lose", source, target]:
                world.net.pop((int(source), int(target)), None)
            case ["adopt", index] if world.next_plan(int(index)) is None:
                raise Unplayable(f"{line.strip()}: it has adopted every plan")
            case [name, *numbers]:
                act(world, Action(name, tuple(int(number) for number in numbers)))
    _run(world, _Run())
    if world.over is not None:
        raise Violation(f"ends by: {world.over}")
    check_end(world)
    return world


def _run(world: World, run: _Run) -> None:
    for _ in range(MAX_ACTIONS):
        if run.until is not None and world.workers[run.until[0]].protocol.step >= run.until[1]:
            return
        actions = [action for action in forced_actions(world) if not run.but & _names(world, action)]
        if not actions:
            return
        act(world, min(actions, key=lambda found: (found.name == "finish", bool(run.last & _names(world, found)))))
    raise Violation(f"no end after {MAX_ACTIONS} actions")


def _clauses(line: str, words: list[str]) -> _Run:
    named: dict[str, list[str]] = {"but": [], "last": [], "until": []}
    clause = ""
    for word in words:
        if word in named:
            clause = word
        elif clause == "until" or (clause and _NAME.fullmatch(word)):
            named[clause].append(word)
        else:
            raise Unplayable(f"{line.strip()}: nothing is called {word!r}")
    but, last = frozenset(named["but"]), frozenset(named["last"])
    match named["until"]:
        case []:
            return _Run(but=but, last=last)
        case [worker, "at", step] if re.fullmatch(r"w\d+", worker) and step.isdecimal():
            return _Run(but=but, last=last, until=(int(worker[1:]), int(step)))
        case _:
            raise Unplayable(f"{line.strip()}: give a worker and a step, as in 'until w0 at 1'")


def _names(world: World, action: Action) -> frozenset[str]:
    """How lines may name this action."""
    match action.name:
        case "deliver" | "lose":
            source, target = action.args
            fact = world.net[(source, target)][0].fact
            return frozenset((f"{source}>{target}", f"{source}>{target}:{type(fact).__name__}"))
        case "hop" | "adopt":
            return frozenset((f"{action.name}{action.args[0]}",))
        case name:
            return frozenset((name,))


def _deliver(world: World, line: str, link: str, fact: str) -> None:
    source, target = (int(index) for index in link.split(">"))
    while queue := world.net.get((source, target)):
        world.deliver(source, target)
        if type(queue[0].fact).__name__ == fact:
            return
    raise Unplayable(f"{line.strip()}: no such fact is under way")
