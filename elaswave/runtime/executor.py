"""Runs a worker's program in order, takes plans at any instruction, and does repair work before it waits."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from elaswave.core.events import RepairHop, WorkDone
from elaswave.core.facts import LossScalars, NonFinite
from elaswave.core.ids import Epoch, Layer, MicroBatch, Step, WorkerId
from elaswave.core.plan import Hop, Plan, RouteTable
from elaswave.core.protocol.state import EdgeKey, HopKey, SumKey
from elaswave.core.schedule import Instruction, Kind, Program, make_schedule
from elaswave.progress import ProgressWriter
from elaswave.runtime.device import Device
from elaswave.runtime.faults import FaultInjector
from elaswave.runtime.hops import HopRunner
from elaswave.runtime.shell import ProtocolShell

OWN_PER_REPAIR: Final = 2
"""Own instructions after each one of repair, while there is both: a forward and a backward pass."""


@dataclass(slots=True, kw_only=True)
class RepairWork:
    """Hops that one plan moved here in the step under way."""

    epoch: Epoch
    step: Step
    hops: list[tuple[MicroBatch, Hop]]
    done: list[RepairHop] = field(default_factory=list)
    bytes: int = 0
    first_start: float = 0.0
    last_end: float = 0.0


class Executor:
    """One worker's compute loop. `turn` does one thing; the session decides when to wait."""

    def __init__(
        self,
        shell: ProtocolShell,
        runner: HopRunner,
        device: Device,
        *,
        progress: ProgressWriter,
        faults: FaultInjector,
        report_work: Callable[[WorkDone], None],
        grant: Callable[[WorkerId, EdgeKey], None] | None = None,
        log_cap_bytes: int = 0,
    ) -> None:
        """`grant` asks the peer of an unbuffered transport for a value; None: links buffer. `log_cap_bytes`: 0 none."""
        self._shell = shell
        self._protocol = shell.protocol
        self._runner = runner
        self._device = device
        self._progress = progress
        self._faults = faults
        self._report_work = report_work
        self._grant = grant
        self._followed: Plan | None = None
        self._table: RouteTable | None = None
        self._program_of_table: Program = ()
        self._losses: dict[tuple[Step, MicroBatch], LossScalars] = {}
        self._program: Program = ()
        self._order_changed = False
        self._position = 0
        self._step = Step(-1)
        self._mine: frozenset[tuple[MicroBatch, Hop]] = frozenset()
        self._taken_over: set[tuple[MicroBatch, Hop]] = set()
        self._repairs: list[RepairWork] = []
        self._extra: list[tuple[MicroBatch, Hop]] = []
        self._own_since_repair = OWN_PER_REPAIR
        self.granted: set[EdgeKey] = set()
        self._asked: set[EdgeKey] = set()
        self._log_cap_bytes = log_cap_bytes
        self._logged: deque[tuple[EdgeKey, int]] = deque()
        self._logged_bytes = 0

    @property
    def is_repairing(self) -> bool:
        """Whether hops that were taken over are still to be run."""
        return bool(self._extra)

    # ------------------------------------------------------------------ plans and steps

    def follow(self) -> None:
        """Begin the step that is under way now, or take the plan's changes into the program.

        Called after every adoption, before its effects are performed, so that what a plan takes out of the total order
        of an unbuffered transport is not held back.
        """
        plan = self._protocol.plan
        if plan is self._followed and self._protocol.step == self._step:
            return
        self._followed = plan
        if self._protocol.step != self._step:
            self._close_repairs()
            self._begin_step(plan)
        if self._step >= self._protocol.job.steps:
            return
        if self._grant is not None:
            self._leave_order(plan)
        mine = frozenset(self._protocol.my_hops())
        moved = sorted(mine - self._mine, key=_order)
        self._mine = mine
        self._taken_over.update(moved)
        self._extra = [found for found in self._extra if found in mine] + moved
        if moved:
            self._repairs.append(RepairWork(epoch=plan.epoch, step=self._step, hops=moved))
        self._change_order(plan.table(self._step))

    def _change_order(self, table: RouteTable) -> None:
        """Go on in the order of the new table: peers that begin the step under this plan have no other.

        With the order of the old one, each of two workers may wait for what the other has further behind.
        """
        before, self._table = self._table, table
        if table is before or (before is not None and table.routes == before.routes):
            return
        self._order_changed = True
        if self._grant is not None:
            self._take_order()
            self.ask_again()

    def _take_order(self) -> None:
        """Not before own work is due: making it takes a millisecond or more, in which what was taken over can begin."""
        if self._order_changed and self._table is not None:
            self._order_changed = False
            program = make_schedule(self._table.routes).programs.get(self._protocol.me, ())
            if self._grant is None:  # transfers are in nobody's way where links buffer
                program = tuple(found for found in program if found.kind in (Kind.FORWARD, Kind.BACKWARD))
            self._program_of_table = program
            self._program, self._position = self._program_of_table, 0

    def ask_again(self) -> None:
        """Ask for values of an unbuffered transport anew: of other peers, or because a link broke on the way."""
        self._asked.clear()
        for found in self._program:
            if found.kind is Kind.RECEIVE and (found.micro_batch, found.hop) in self._extra:
                self._receive_in_order(found)  # runs in any order: its peer may keep to one

    def _begin_step(self, plan: Plan) -> None:
        self._step = self._protocol.step
        self._position = 0
        self._extra = []
        self._taken_over = set()
        self._asked.clear()
        self.granted = {key for key in self.granted if key.step >= self._step}
        if self._step >= self._protocol.job.steps:
            self._program, self._mine = (), frozenset()
            return
        table = plan.table(self._step)
        if table is not self._table:
            self._table, self._order_changed = table, True
        self._take_order()
        self._program = self._program_of_table
        self._mine = frozenset(self._protocol.my_hops())
        if self._grant is not None:
            self._shell.ordered.edges = {self._edge(found) for found in self._program if found.kind is Kind.SEND}

    def _leave_order(self, plan: Plan) -> None:
        """Edges of changed hops leave the total order: from now on they travel as soon as they are made."""
        routes = plan.table(self._step).routes
        kept: set[EdgeKey] = set()
        for found in self._program[self._position :]:
            if found.kind is Kind.SEND and found.hop in routes[found.micro_batch] and self._peer_unchanged(found, plan):
                kept.add(self._edge(found))
        self._shell.ordered.edges &= kept
        for key in [key for key in self._shell.ordered.ready if key not in kept]:
            # The protocol has sent it again from its log if somebody still needs it.
            del self._shell.ordered.ready[key]

    def _peer_unchanged(self, found: Instruction, plan: Plan) -> bool:
        """The other end of a program edge is still run by the same worker under the same assignment."""
        table = self._table
        if table is None:
            return False
        before, after = table.routes[found.micro_batch], plan.table(self._step).routes[found.micro_batch]
        place = before.index(found.hop) + (-1 if (found.kind is Kind.SEND) == found.backward else 1)
        return before[place] in after

    # ------------------------------------------------------------------ one turn

    def turn(self) -> bool:
        """Run one instruction, repair work first; False where everything waits for others."""
        if self._protocol.step != self._step:
            self.follow()
        return self._replay() or self._run_extra_or_program()

    def _run_extra_or_program(self) -> bool:
        """What was taken over begins at once, then in turn with own work: nobody behind this worker must starve."""
        due = self._own_since_repair >= OWN_PER_REPAIR
        if due and self._run_extra():
            self._own_since_repair = 0
            return True
        if self._run_program():
            self._own_since_repair += 1
            return True
        return not due and self._run_extra()

    def _replay(self) -> bool:
        """Make a value again that the capped log has dropped and somebody needs; its contribution is in already."""
        for key, hop in self._protocol.replays.items():
            if not self._protocol.layers_ready(hop.first, hop.last):
                continue
            hop_key = self._hop_key(key.micro_batch, hop)
            forward = self._runner.forward(hop_key, *self._input(key.micro_batch, hop))
            value = forward.output
            if key.backward:
                value = self._runner.backward(hop_key, self._gradient(key.micro_batch, hop)).input_gradient
            elif not self._protocol.is_between(key.micro_batch, hop):
                self._runner.discard(hop_key)
            self._protocol.replayed(key, None if value is None else self._device.to_host(value))
            self._shell.perform()
            return True
        return False

    def _input(self, micro_batch: MicroBatch, hop: Hop) -> tuple[Tensor | None, NonFinite | None]:
        """What came for the hop's forward pass; nothing for the first layer, whose samples are loaded."""
        edge = self._protocol.input_of(micro_batch, hop.first, backward=False) if hop.first else None
        if edge is None:
            return None, None
        return (edge.payload if isinstance(edge.payload, Tensor) else None), edge.non_finite

    def _gradient(self, micro_batch: MicroBatch, hop: Hop) -> Tensor | None:
        """What came for the hop's backward pass; nothing where it ends in the loss."""
        if hop.last == self._protocol.job.shape.layers:
            return None
        edge = self._protocol.input_of(micro_batch, hop.last, backward=True)
        return edge.payload if edge is not None and isinstance(edge.payload, Tensor) else None

    def _run_extra(self) -> bool:
        for found in self._extra:
            micro_batch, hop = found
            if self._protocol.can_backward(micro_batch, hop):
                self._backward(micro_batch, hop, recovery=True)
                self._extra.remove(found)
                return True
        for micro_batch, hop in self._extra:
            if self._protocol.can_forward(micro_batch, hop):
                self._forward(micro_batch, hop, recovery=True)
                return True
        return False

    def _run_program(self) -> bool:
        self._take_order()
        while self._position < len(self._program):
            instruction = self._program[self._position]
            found = (instruction.micro_batch, instruction.hop)
            if found not in self._mine or found in self._extra:
                self._position += 1
                continue
            done = self._try(instruction)
            if done is None:
                return False
            self._position += 1
            if done:
                return True
        return False

    def _try(self, instruction: Instruction) -> bool | None:
        """True: run. False: nothing to do. None: it has to wait."""
        micro_batch, hop = instruction.micro_batch, instruction.hop
        match instruction.kind:
            case Kind.FORWARD:
                if self._protocol.is_between(micro_batch, hop) or self._protocol.contributed(micro_batch, hop):
                    return False
                if not self._protocol.can_forward(micro_batch, hop):
                    return None
                self._forward(micro_batch, hop)
                return True
            case Kind.BACKWARD:
                if self._protocol.contributed(micro_batch, hop):
                    return False
                if not self._protocol.can_backward(micro_batch, hop):
                    return None
                self._backward(micro_batch, hop)
                return True
            case Kind.SEND:
                return self._send_in_order(instruction)
            case Kind.RECEIVE:
                return self._receive_in_order(instruction)

    # ------------------------------------------------------------------ unbuffered transport

    def _send_in_order(self, instruction: Instruction) -> bool | None:
        key = self._edge(instruction)
        if self._grant is None or key not in self._shell.ordered.edges:
            return False
        if key not in self.granted:
            return None
        effect = self._shell.ordered.ready.pop(key)
        self._shell.ordered.edges.discard(key)
        payload = effect.payload
        self._shell.send_fact(effect.to, effect.fact, payload if isinstance(payload, Tensor) else None)
        return True

    def _receive_in_order(self, instruction: Instruction) -> bool | None:
        if self._grant is None or instruction.peer is None:
            return False
        key = self._edge(instruction)
        here = self._protocol.input_of(key.micro_batch, key.cut, backward=key.backward) is not None
        if here or not self._peer_unchanged(instruction, self._protocol.plan):
            return False
        if key not in self._asked:
            self._asked.add(key)
            self._grant(instruction.peer, key)
        return None

    def _edge(self, instruction: Instruction) -> EdgeKey:
        return EdgeKey(self._step, instruction.micro_batch, instruction.cut, instruction.backward)

    # ------------------------------------------------------------------ hops

    def _forward(self, micro_batch: MicroBatch, hop: Hop, *, recovery: bool = False) -> None:
        started = self._start_hop(micro_batch, backward=False, recovery=recovery)
        value, upstream = self._input(micro_batch, hop)
        result = self._runner.forward(self._hop_key(micro_batch, hop), value, upstream)
        output = None if result.output is None else self._device.to_host(result.output)
        if result.loss is not None:
            self._losses[(self._step, micro_batch)] = result.loss
        self._protocol.forward_done(micro_batch, hop, output, result.non_finite)
        self._log(micro_batch, hop.last, output, backward=False)
        self._end_hop(micro_batch, hop, started, backward=False, received=value)

    def _backward(self, micro_batch: MicroBatch, hop: Hop, *, recovery: bool = False) -> None:
        started = self._start_hop(micro_batch, backward=True, recovery=recovery)
        is_last = hop.last == self._protocol.job.shape.layers
        value = self._gradient(micro_batch, hop)
        result = self._runner.backward(self._hop_key(micro_batch, hop), value)
        for contribution in result.contributions:
            self._shell.accumulate(micro_batch, SumKey(self._step, contribution.layer, hop.epoch), contribution)
        gradient = None if result.input_gradient is None else self._device.to_host(result.input_gradient)
        loss = self._losses.pop((self._step, micro_batch)) if is_last else None
        self._protocol.backward_done(micro_batch, hop, gradient, loss)
        self._log(micro_batch, hop.first, gradient, backward=True)
        self._end_hop(micro_batch, hop, started, backward=True, received=value)

    def _log(self, micro_batch: MicroBatch, cut: Layer, value: Tensor | None, *, backward: bool) -> None:
        """Count what the boundary log keeps; over the cap, drop the oldest values."""
        if value is None or not self._log_cap_bytes:
            return
        self._logged.append((EdgeKey(self._step, micro_batch, cut, backward), value.nbytes))
        self._logged_bytes += value.nbytes
        while self._logged_bytes > self._log_cap_bytes and self._logged:
            key, size = self._logged.popleft()
            self._logged_bytes -= size
            if key.step == self._step:
                self._protocol.evict(key)

    def _start_hop(self, micro_batch: MicroBatch, *, backward: bool, recovery: bool) -> float:
        phase = "backward" if backward else "forward"
        self._progress.begin(self._step, phase)
        self._progress.hop(self._step, micro_batch, backward, done=False)
        own = len(self._mine) - len(self._taken_over & self._mine)
        self._faults.at(self._step, phase, expected=own, recovery=recovery)
        return time.monotonic()

    def _end_hop(self, micro_batch: MicroBatch, hop: Hop, started: float, *, backward: bool, received: object) -> None:
        self._faults.stretch(started)
        self._progress.hop(self._step, micro_batch, backward, done=True)
        for work in self._repairs:
            if (micro_batch, hop) in work.hops:
                work.done.append(RepairHop(micro_batch=micro_batch, first_layer=hop.first, backward=backward))
                work.bytes += received.nbytes if isinstance(received, Tensor) else 0
                work.first_start = work.first_start or started
                work.last_end = time.monotonic()
        step = self._step
        self._shell.perform()
        if self._protocol.step == step:
            self._report_finished_repairs()

    def _report_finished_repairs(self) -> None:
        for work in list(self._repairs):
            if all(self._protocol.contributed(micro_batch, hop) for micro_batch, hop in work.hops):
                self._report(work)

    def _close_repairs(self) -> None:
        """The step is decided: what was not run was not needed."""
        for work in list(self._repairs):
            self._report(work)
        self._losses = {}

    def _report(self, work: RepairWork) -> None:
        self._repairs.remove(work)
        self._report_work(
            WorkDone(
                worker=self._protocol.me,
                epoch=work.epoch,
                step=work.step,
                hops=tuple(work.done),
                bytes=work.bytes,
                first_start=work.first_start,
                last_end=work.last_end,
            )
        )

    def _hop_key(self, micro_batch: MicroBatch, hop: Hop) -> HopKey:
        return HopKey(step=self._step, micro_batch=micro_batch, first=hop.first, last=hop.last)


def _order(found: tuple[MicroBatch, Hop]) -> tuple[MicroBatch, Layer]:
    return found[0], found[1].first
