"""The symbolic system of elaswave.sim with the real executor: hops run in the order of programs, not in any order.

Tensors are tuples that say what they are. Everything else is the project's own: controller, plans, protocol, programs.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

from elaswave.core.facts import Activation, Gradient, Have, LossScalars
from elaswave.core.ids import Layer
from elaswave.core.plan import Plan
from elaswave.core.protocol import effects as do
from elaswave.core.protocol.state import EdgeKey, HopKey, SumKey
from elaswave.core.protocol.worker import StepProtocol
from elaswave.runtime.executor import Executor
from elaswave.runtime.shell import OrderedEdges, edge_key
from elaswave.sim.shell import Message, WorkerShell, loss_of
from elaswave.sim.system import System, SystemScene
from elaswave.sim.world import Action

MOST_ACTIONS = 200_000
_IDLE = SimpleNamespace(begin=lambda *_, **__: None, hop=lambda *_, **__: None)
_HOST = SimpleNamespace(to_host=lambda value: value)


class _Death(Exception):
    """The worker dies instead of sending this."""


@dataclass(frozen=True, slots=True)
class FaultPlace:
    """A pass of a worker, in which a fault could strike: how many of its phase it expects in the step."""

    worker: int
    step: int
    phase: str
    expected: int
    recovery: bool


class _Parts:
    """What the executor knows as its shell, and as its runner of hops."""

    def __init__(self, system: "ExecutedSystem", index: int) -> None:
        self._system = system
        self._index = index
        self.ordered = OrderedEdges()

    @property
    def _shell(self) -> WorkerShell:
        return self._system.workers[self._index]

    @property
    def protocol(self) -> StepProtocol:
        return self._shell.protocol

    def perform(self) -> None:
        self._system._perform(self._index)

    def send_fact(self, to: int, fact: object, payload: object) -> None:
        self._system._send(self._index, int(to), Message(fact, payload))

    def accumulate(self, micro_batch: int, key: SumKey, _contribution: object) -> None:
        sums = self._shell.sums
        sums[key] = (*sums.get(key, ()), (key.step, int(key.layer), int(micro_batch)))

    def forward(self, hop: HopKey, _value: object, _upstream: object = None) -> SimpleNamespace:
        self._shell.forwards |= {hop}
        last = hop.last == self.protocol.job.shape.layers
        output = None if last else ("activation", hop.step, hop.micro_batch, hop.last)
        loss = LossScalars(loss=loss_of(hop.micro_batch), tokens=1) if last else None
        return SimpleNamespace(output=output, loss=loss, non_finite=None)

    def backward(self, hop: HopKey, _gradient: object) -> SimpleNamespace:
        self._shell.forwards -= {hop}
        made = [SimpleNamespace(layer=Layer(layer)) for layer in range(hop.first, hop.last)]
        gradient = ("gradient", hop.step, hop.micro_batch, hop.first) if hop.first else None
        return SimpleNamespace(contributions=made, input_gradient=gradient)

    def discard(self, hop: HopKey) -> None:
        self._shell.forwards -= {hop}


class ExecutedSystem(System):
    """`doomed`: workers, and the step of which each dies before it says what it has."""

    def __init__(self, scene: SystemScene, doomed: Mapping[int, int], *, unbuffered: bool) -> None:
        self._executors: dict[int, Executor] = {}
        self._parts: dict[int, _Parts] = {}
        self._doomed = dict(doomed)
        self._unbuffered = unbuffered
        self.idle: set[int] = set()
        self.fault_places: list[FaultPlace] = []
        super().__init__(scene)

    def executor(self, index: int) -> Executor:
        """The worker's, made when it is first needed."""
        found = self._executors.get(index)
        if found is None:
            parts = self._parts[index] = _Parts(self, index)

            def grant(peer: int, key: EdgeKey) -> None:
                self._send(index, int(peer), Message(("grant", key), None))

            def at(step: int, phase: str, *, expected: int, recovery: bool) -> None:
                self.fault_places.append(FaultPlace(index, int(step), phase, expected, recovery))

            found = self._executors[index] = Executor(
                parts,
                parts,
                _HOST,
                progress=_IDLE,
                faults=SimpleNamespace(at=at, stretch=lambda _: None),
                report_work=lambda _: None,
                grant=grant if self._unbuffered else None,
            )  # type: ignore[arg-type]
            found.follow()
        return found

    def ready_hops(self, index: int) -> list[object]:
        """None: hops run in turns."""
        return []

    def changed(self, index: int) -> None:
        self.idle.discard(index)

    def _perform(self, index: int) -> None:
        shell = self.touch(index)
        while effects := shell.protocol.take_effects():
            for effect in effects:
                if isinstance(effect, do.StepDecided) and index in self._parts:
                    self._parts[index].ordered = OrderedEdges()
                if isinstance(effect, do.Send) and self._holds(index, effect):
                    continue
                message = shell.perform(effect)
                if message is not None:
                    self._send(index, int(effect.to), message)
        self._check_decisions(shell)

    def _holds(self, index: int, effect: do.Send) -> bool:
        """Kept back for its place in the order of an unbuffered transport."""
        if isinstance(effect.fact, Have) and self._doomed.get(index) == effect.fact.step:
            raise _Death
        if not isinstance(effect.fact, Activation | Gradient) or index not in self._parts:
            return False
        ordered, key = self._parts[index].ordered, edge_key(effect.fact)
        if key in ordered.edges:
            ordered.ready[key] = effect
        return key in ordered.edges

    def _follow(self, index: int, plan: Plan) -> None:
        self.touch(index).protocol.adopt(plan)
        self.executor(index).follow()
        self._perform(index)

    def _act(self, action: Action) -> None:
        index = action.args[-1]
        if action.name == "turn":
            self.touch(index)
            if not self.executor(index).turn():
                self.idle.add(index)
        elif action.name == "deliver" and isinstance(self.net[action.args][0].fact, tuple):
            self._deliver_grant(action)
        else:
            super()._act(action)
            if action.name == "deliver":
                self.executor(index).follow()

    def _deliver_grant(self, action: Action) -> None:
        first, *rest = self.net.pop(action.args)
        if rest:
            self.net[action.args] = tuple(rest)
        self.executor(action.args[1]).granted.add(first.fact[1])
        self.idle.discard(action.args[1])

    def work(self, action: Action) -> None:
        try:
            super().work(action)
        except _Death:
            index = action.args[-1]
            del self._doomed[index]
            self.kill(index)

    def possible(self) -> list[Action]:
        """What can happen now; nothing where everybody waits for ever."""
        found = [Action("deliver", link) for link in self.net if self.acts(link[1])]
        found += [Action("lose", link) for link in self.net if link[0] in self.down]
        found += [Action("turn", (index,)) for index in self.workers if self.acts(index) and index not in self.idle]
        found += [
            Action("adopt", (index,))
            for index in self.node_of
            if self.acts(index) and self.next_plan(index) is not None
        ]
        return found + [Action("tell", (index,)) for index, events in self.told.items() if events]


def walk_executed(scene: SystemScene, seed: int, doomed: Mapping[int, int], *, unbuffered: bool) -> ExecutedSystem:
    """A random run, in which some kinds of events and some workers are slower than others, until nothing can happen."""
    chosen = random.Random(seed)
    system = ExecutedSystem(scene, doomed, unbuffered=unbuffered)
    speeds = {name: chosen.choice((1.0, 1.0, 0.1, 0.02)) for name in ("adopt", "tell", "deliver", "turn")}
    speeds["lose"] = chosen.choice((0.01, 0.1))
    workers = {index: chosen.choice((1.0, 1.0, 0.2)) for index in range(scene.config.started_workers)}
    for _ in range(MOST_ACTIONS):
        actions = system.possible()
        if system.ended is not None or not actions:
            return system
        weights = [speeds[action.name] * workers[action.args[0]] for action in actions]
        (action,) = chosen.choices(actions, weights)
        if action.name == "lose":
            system.lose(*action.args)
        elif action.name == "tell":
            system.handle(system.told[action.args[0]].pop(0))
        else:
            system.work(action)
    raise AssertionError(f"seed {seed}: no end after {MOST_ACTIONS} actions")
