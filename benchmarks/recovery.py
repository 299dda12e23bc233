"""Recovery from SIGKILL of 1 of 8 workers (DP 4 x PP 2) at random moments.

    python benchmarks/recovery.py [--quick] [--json FILE]

The device is emulated: a layer does a tiny real computation and then sleeps for the time that a device would take,
10 ms for a hop (one micro-batch through one stage, one direction), so that 8 workers fit on few cores. A real SIGKILL
from outside hits a random worker at a random moment; the job restarts the worker, and when it is in full strength and
steady again comes the next kill.

Figures called "records" come from what the model's layers have written down, those called "report" from the incidents
that the job reports. An instruction is one layer of one micro-batch in one direction; two of them make a hop here.
"""

import random
import signal
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, field

from common import Options, Row, Target, chance_limit, make_parser, options_of, quantile, run
from faults import Campaign, Emulation, Fault, executions_around
from instructions import Execution, Loss, LossFacts, Records, fed_spans_of, spans_of, undisturbed_gaps
from launching import make_place

EMULATION = Emulation(dp=4, pp=2, nnodes=4)
WINDOWS = 100
"""Undisturbed windows looked at for each bystander of each kill."""


@dataclass(slots=True, kw_only=True)
class Figures:
    """What was found at all kills. Milliseconds where a time."""

    kills: list[Fault] = field(default_factory=list)
    losses: list[LossFacts] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    undisturbed: list[float] = field(default_factory=list)
    holds: list[float] = field(default_factory=list)
    undisturbed_holds: list[float] = field(default_factory=list)
    unclear: int = 0

    def add(self, fault: Fault, executions: list[Execution], generator: random.Random) -> None:
        """Take in one kill."""
        self.kills.append(fault)
        facts = Loss(executions, fault.worker, fault.at).facts()
        if facts is None:
            self.unclear += 1
            return
        self.losses.append(facts)
        before = [execution for execution in executions if execution.ended is not None and execution.ended < fault.at]
        for worker, gap in facts.longest_gaps.items():
            self.gaps.append(1e3 * gap)
            windows = undisturbed_gaps(spans_of(before, worker), facts.resume_s, WINDOWS, generator)
            self.undisturbed += [1e3 * found for found in windows]
        for worker, hold in facts.longest_holds.items():
            self.holds.append(1e3 * hold)
            windows = undisturbed_gaps(fed_spans_of(before, worker), facts.resume_s, WINDOWS, generator)
            self.undisturbed_holds += [1e3 * found for found in windows]

    def rows(self, failures: int) -> list[Row]:
        """The table."""
        return [*self._time_rows(), *self._work_rows(), *self._gap_rows(), self._survival_row(failures)]

    def _time_rows(self) -> list[Row]:
        resume = [1e3 * facts.resume_s for facts in self.losses]
        reported = [1e3 * fault.incident.resume_s for fault in self.kills if fault.incident.resume_s >= 0]
        what = "kill to first instruction in its place (records)"
        rows = [
            Row(what=what, unit="ms", figures=resume, target=Target(of="median", limit=60)),
            Row(what=f"{what}, greatest", unit="ms", figures=resume, target=Target(of="max", limit=250)),
            Row(what="last sign of life to first moved hop (report)", unit="ms", figures=reported),
        ]
        for name in ("detect", "plan", "edit", "repair", "delay"):
            values = [getattr(fault.incident, f"{name}_s") for fault in self.kills]
            known = [1e3 * value for value in values if value != -1]
            rows.append(Row(what=f"{name} (report)", unit="ms", figures=known))
        return rows

    def _work_rows(self) -> list[Row]:
        incidents = [fault.incident for fault in self.kills]
        beyond = [max(0, incident.redone_hops - incident.dead_hops) for incident in incidents]
        others = [facts.redone_of_others for facts in self.losses]
        none = Target(of="max", limit=0)
        return [
            Row(what="hops of the dead worker (report)", unit="hops", figures=[found.dead_hops for found in incidents]),
            Row(what="hops done again (report)", unit="hops", figures=[found.redone_hops for found in incidents]),
            Row(what="hops done again beyond those (report)", unit="hops", figures=beyond, target=none),
            Row(what="dead worker's instructions (records)", unit="", figures=[found.dead for found in self.losses]),
            Row(what="of these done again (records)", unit="", figures=[found.redone for found in self.losses]),
            Row(what="done again of anybody else's (records)", unit="", figures=others, target=none),
        ]

    def _gap_rows(self) -> list[Row]:
        if not self.gaps or not self.undisturbed:
            return [Row(what="gaps of workers without superseded work", unit="ms", note="not measured: no bystanders")]
        return [
            *_beside_undisturbed("longest gap of a bystander, kill to resumption", self.gaps, self.undisturbed),
            *_beside_undisturbed("of it with the next input there", self.holds, self.undisturbed_holds),
        ]

    def _survival_row(self, failures: int) -> Row:
        note = f"of {len(self.kills)} kills"
        target = Target(of="max", limit=0)
        return Row(what="jobs not back in full strength", unit="", figures=[failures], target=target, note=note)


def _beside_undisturbed(what: str, figures: list[float], undisturbed: list[float]) -> list[Row]:
    limit = quantile(undisturbed, 0.99)
    beyond = sum(figure > limit for figure in figures)
    chance = chance_limit(len(figures), 0.01)
    return [
        Row(what=what, unit="ms", figures=figures),
        Row(what="  the same in undisturbed windows", unit="ms", figures=undisturbed),
        Row(
            what="  beyond the undisturbed p99",
            unit="",
            figures=[beyond],
            target=Target(of="max", limit=chance),
            note=f"of {len(figures)}; p99 is {limit:.1f} ms; chance alone gives up to {chance}",
        ),
    ]


def measure(found: Namespace, options: Options) -> tuple[list[Row], list[str]]:
    """All kills: the table, and what is to be said below it."""
    generator = random.Random(options.seed)
    emulation = Emulation(dp=EMULATION.dp, pp=EMULATION.pp, nnodes=EMULATION.nnodes, restarts=found.kills)
    figures, failures = Figures(), list[str]()
    with make_place() as place:
        campaign = Campaign(
            place=place,
            emulation=emulation,
            number=signal.SIGKILL,
            count=found.kills,
            generator=generator,
            failures=failures,
        )
        for story in campaign.run():
            records = Records(story.records)
            for fault in story.faults:
                figures.add(fault, executions_around(story, fault, emulation, records), generator)
    phases = Counter(fault.incident.phase or "none" for fault in figures.kills)
    notes = ["killed in: " + ", ".join(f"{phase} {count}" for phase, count in phases.most_common())]
    if figures.unclear:
        notes.append(f"{figures.unclear} kills without figures from records: steps before were not alike")
    notes += [f"failure: {text}" for text in failures]
    return figures.rows(len(failures)), notes


def main() -> None:
    """Measure."""
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, metavar="N", help="kills (default: 24, with --quick 4)")
    found = parser.parse_args()
    found.kills = found.kills or (4 if found.quick else 24)
    options = options_of("recovery", found)
    options.finish(*measure(found, options))


if __name__ == "__main__":
    run(main)
