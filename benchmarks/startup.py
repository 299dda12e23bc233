"""Start: launch to the first step with 8 workers, beside a bare `import torch`; memory of a forked worker.

    python benchmarks/startup.py [--quick] [--json FILE]

Each round measures, one after the other, a Python process that does nothing but import torch, and elaswave-launch with
8 workers (DP 4 x PP 2, a tiny model) from the start of its process to the end of the first step.

Memory: what a worker has for itself (Private_* in smaps_rollup: pages that it shares with the process it was forked
from do not count), of spares that have read the script and wait, and of workers that train the same tiny model, whose
tensors are a few kilobytes.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common import BenchmarkFailed, Row, Target, alternate, make_parser, options_of, paired_ratios, run
from launching import Job, Place, make_place, members

LIMIT_S = 120.0
POLL_S = 0.01
STEPS = 20_000
MEGABYTE = 1e6
LAUNCH = ("--nnodes=4", "--nproc-per-node=2", "--dp=4", "--pp=2")
SPARES = ("--nproc-per-node=8", "--dp=2", "--pp=2", "--spares=4")


def import_torch(place: Place) -> float:
    """Seconds of `python -c "import torch"`."""
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", "import torch"], env=place.environment, check=True, timeout=LIMIT_S, process_group=0
    )
    return time.monotonic() - began


def launch_to_first_step(place: Place) -> float:
    """Seconds from the launcher's start to the end of the first step."""
    records = place.folder("records")
    first_step = records / "first_step"
    script_flags = [f"--records={records}", f"--steps={STEPS}", f"--first-step={first_step}"]
    job = place.launch(LAUNCH, "emulated.py", script_flags)
    try:
        return _wait_number(first_step, job) - job.child.started_at
    finally:
        place.close_job(job)


def _wait_number(path: Path, job: Job) -> float:
    deadline = time.monotonic() + LIMIT_S
    while job.child.running:
        text = path.read_text() if path.exists() else ""
        if text:
            return float(text)
        if time.monotonic() > deadline:
            raise BenchmarkFailed(f"the first step was not done within {LIMIT_S:g} s\n{job.child.tail()}")
        time.sleep(POLL_S)
    raise BenchmarkFailed(f"the job ended before its first step\n{job.child.tail()}")


def private_bytes(pid: int) -> int:
    """Memory that this process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def memory_rows(place: Place) -> list[Row]:
    """Private memory of spares and of training workers."""
    script_flags = [f"--records={place.folder('records')}", f"--steps={STEPS}"]
    job = place.launch(SPARES, "emulated.py", script_flags)
    status = job.wait_steady(4, 20, LIMIT_S)
    idle = [worker.pid for worker in status.workers if worker.state == "warm" and worker.pid]
    training = [worker.pid for worker in members(status)]
    target = Target(of="max", limit=30)
    rows = [
        _memory_row("private memory of a spare that waits", idle, target),
        _memory_row("private memory of a worker that trains", training, None),
    ]
    job.stop()
    return rows


def _memory_row(what: str, pids: Sequence[int], target: Target | None) -> Row:
    return Row(what=what, unit="MB", figures=[private_bytes(pid) / MEGABYTE for pid in pids], target=target)


def main() -> None:
    """Measure both."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, metavar="N", help="starts of each kind (default: 7, with --quick 2)")
    found = parser.parse_args()
    options = options_of("startup", found)
    with make_place() as place:
        import_torch(place)  # from disk into the page cache
        systems = {"import": lambda: import_torch(place), "launch": lambda: launch_to_first_step(place)}
        figures = alternate(systems, found.rounds or (2 if found.quick else 7))
        ratios = paired_ratios(figures["launch"], figures["import"])
        rows = [
            Row(what="bare import torch", unit="s", figures=figures["import"]),
            Row(what="launch to the end of the first step, 8 workers", unit="s", figures=figures["launch"]),
            Row(what="launch / bare import", unit="x", figures=ratios, target=Target(of="median", limit=2.0)),
            *memory_rows(place),
        ]
    options.finish(rows)


if __name__ == "__main__":
    run(main)
