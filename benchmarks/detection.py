"""Detection: how soon SIGSTOP, and the kill of a worker with much memory, are recognised; false alarms.

    python benchmarks/detection.py [--quick] [--json FILE]

A real SIGSTOP from outside hits a random worker of 8 (DP 4 x PP 2, emulated device) at a random moment. Recognised is
when the agent notices it by the state of the process. The report counts from the worker's last sign of life, which may
be up to half a second before the signal where the worker waited for others; the table takes the time from the signal
until the first instruction that somebody else runs in its place, which is the later and the more useful moment, beside
the report's detect_s. After each trial the stopped worker is killed, so that its restart need not wait for its fencing.

A killed process has ended, for its pidfd and its sockets, only when its memory is freed; so the same is done with
SIGKILL where every worker holds --gib GiB besides.

For false alarms the same job trains beside busy loops: any incident, and any worker that is seen in a state other than
"member", is an alarm.
"""

import os
import random
import signal
import sys
import time
from dataclasses import dataclass, replace

from common import BenchmarkFailed, Options, Row, Target, make_parser, options_of, run, say
from faults import START_LIMIT_S, STEPS, Campaign, Emulation, Fault, executions_around
from instructions import Loss, Records
from launching import Job, Place, make_place

LOOK_EVERY_S = 0.25
_BUSY = """\
import sys
from elaswave.lifeline import end_with_parent
end_with_parent(int(sys.argv[1]))
while True:
    pass
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strikes:
    """Faults of one kind. resume_ms: until the first instruction that somebody else runs in a worker's place."""

    faults: list[Fault]
    resume_ms: list[float]
    failures: list[str]

    @property
    def detect(self) -> Row:
        """What the report says."""
        figures = [1e3 * fault.incident.detect_s for fault in self.faults]
        return Row(what="last sign of life to noticed (report)", unit="ms", figures=figures)

    @property
    def notes(self) -> list[str]:
        """Jobs that have failed."""
        return [f"failure: {text}" for text in self.failures]


def strike(place: Place, number: signal.Signals, count: int, options: Options, gib: float = 0.0) -> Strikes:
    """This signal at random moments; each worker holds `gib` GiB besides."""
    emulation = Emulation(dp=4, pp=2, nnodes=4, restarts=count, ballast_gib=gib)
    strikes = Strikes(faults=[], resume_ms=[], failures=[])
    generator = random.Random(options.seed)
    campaign = Campaign(
        place=place, emulation=emulation, number=number, count=count, generator=generator, failures=strikes.failures
    )
    for story in campaign.run():
        records = Records(story.records)
        for fault in story.faults:
            facts = Loss(executions_around(story, fault, emulation, records), fault.worker, fault.at).facts()
            strikes.faults.append(fault)
            strikes.resume_ms.extend([1e3 * facts.resume_s] if facts is not None else [])
    return strikes


def stop_rows(strikes: Strikes) -> list[Row]:
    """SIGSTOP."""
    within = Target(of="max", limit=1000)
    what = "SIGSTOP to first instruction in its place (records)"
    by_state = sum(fault.incident.cause == "stopped" for fault in strikes.faults)
    every = Target(of="min", limit=len(strikes.faults), least=True)
    note = f"of {len(strikes.faults)}"
    failed = [len(strikes.failures)]
    return [
        Row(what=what, unit="ms", figures=strikes.resume_ms, target=within),
        replace(strikes.detect, target=within),
        Row(what="recognised by process state", unit="", figures=[by_state], target=every, note=note),
        Row(what="jobs not back in full strength", unit="", figures=failed, target=Target(of="max", limit=0)),
    ]


def kill_rows(strikes: Strikes, gib: float) -> list[Row]:
    """SIGKILL of workers that hold a lot of memory."""
    what = f"SIGKILL of a worker with {gib:g} GiB to first instruction in its place (records)"
    ended = [1e3 * fault.ended_s for fault in strikes.faults if fault.ended_s is not None]
    return [
        Row(what=what, unit="ms", figures=strikes.resume_ms),
        strikes.detect,
        Row(what="SIGKILL to the end of the process (pidfd)", unit="ms", figures=ended),
    ]


def count_alarms(job: Job, workers: int, seconds: float) -> tuple[int, int]:
    """Train for this long: (false alarms, steps)."""
    first = job.wait_steady(workers, 1, START_LIMIT_S)
    began = time.monotonic()
    alarms: set[tuple[int, str]] = set()
    step, shown = first.step, began
    while time.monotonic() < began + seconds:
        status = job.status()
        if status is not None:
            alarms |= {(worker.worker, worker.state) for worker in status.workers if worker.state != "member"}
            alarms |= {(worker, incident.cause) for incident in status.incidents for worker in incident.workers}
            step = max(step, status.step)
        if time.monotonic() > shown + 30:
            shown = time.monotonic()
            say(f"{shown - began:.0f} of {seconds:g} s: step {step}, {len(alarms)} alarms")
        time.sleep(LOOK_EVERY_S)
    if step == first.step:
        raise BenchmarkFailed(f"no step was made in {seconds:g} s")
    return len(alarms), step - first.step


def alarm_rows(place: Place, seconds: float, loops: int) -> list[Row]:
    """Training beside busy loops."""
    emulation = Emulation(dp=4, pp=2, nnodes=4)
    script_flags = emulation.script_flags(place.folder("records"), steps=10 * STEPS)
    job = place.launch(emulation.flags, "emulated.py", script_flags)
    output = place.folder("busy") / "output.txt"
    for _ in range(loops):
        place.start([sys.executable, "-c", _BUSY, str(os.getpid())], output)
    alarms, steps = count_alarms(job, emulation.workers, seconds)
    job.stop()
    note = f"{steps} steps in {seconds:g} s beside {loops} busy loops"
    return [Row(what="false alarms", unit="", figures=[alarms], target=Target(of="max", limit=0), note=note)]


def main() -> None:
    """Measure both."""
    parser = make_parser(__doc__)
    parser.add_argument("--trials", type=int, metavar="N", help="SIGSTOPs (default: 10, with --quick 2)")
    parser.add_argument(
        "--minutes", type=float, metavar="N", help="training beside busy loops (default: 10; quick: 0.5)"
    )
    parser.add_argument("--kills", type=int, metavar="N", help="SIGKILLs (default: 8, with --quick 1)")
    parser.add_argument("--gib", type=float, default=1.0, help="memory of each worker that is killed (default: 1)")
    parser.add_argument("--loops", type=int, default=2, metavar="N", help="busy loops (default: 2)")
    found = parser.parse_args()
    trials = found.trials or (2 if found.quick else 10)
    minutes = found.minutes or (0.5 if found.quick else 10)
    options = options_of("detection", found)
    with make_place() as place:
        stops = strike(place, signal.SIGSTOP, trials, options)
        kills = strike(place, signal.SIGKILL, found.kills or (1 if found.quick else 8), options, found.gib)
        rows = [*stop_rows(stops), *kill_rows(kills, found.gib)]
        rows += alarm_rows(place, 60 * minutes, found.loops)
    options.finish(rows, [*stops.notes, *kills.notes])


if __name__ == "__main__":
    run(main)
