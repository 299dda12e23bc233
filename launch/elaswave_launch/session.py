"""Shows and supervises a job whose processes have been started."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from elaswave_launch.children import Child
from elaswave_launch.commands import Place
from elaswave_launch.display import Display, LiveDisplay, open_display
from elaswave_launch.preflight import Launch
from elaswave_launch.signals import Signals
from elaswave_launch.supervise import FAILED, Ending, Supervision
from elaswave_launch.tail import OutputTail

_LAST_BYTES = 4000
_LAST_LINES = 15


def run_session(launch: Launch, place: Place, children: Sequence[Child], signals: Signals, address: str) -> int:
    """Run the job to its end and return its exit code. What went wrong is on stderr, once."""
    display = open_display()
    try:
        ending = asyncio.run(_run(launch, place, children, signals, address, display=display))
    finally:
        display.close()
        for child in children:
            child.close()
    if ending.message and ending.exit_code:
        sys.stderr.write(f"elaswave-launch: {ending.message.rstrip()}\n")
        if ending.exit_code == FAILED and "Traceback" not in ending.message:
            sys.stderr.write(last_words(place.job_logs))
    return ending.exit_code


def last_words(job_logs: Path) -> str:
    """The end of the standard error that a worker wrote last: a crash in native code is explained nowhere else."""
    written = [path for path in job_logs.glob("*/rank_*.err") if path.stat().st_size]
    if not written:
        return ""
    newest = max(written, key=lambda path: path.stat().st_mtime_ns)
    with newest.open("rb") as file:
        file.seek(max(0, newest.stat().st_size - _LAST_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()[-_LAST_LINES:]
    return f"last lines of {newest.parent.name}/{newest.name}:\n" + "".join(f"  {line}\n" for line in lines)


async def _run(
    launch: Launch, place: Place, children: Sequence[Child], signals: Signals, address: str, *, display: Display
) -> Ending:
    options = launch.options
    ranks = options.shown_ranks

    def show(rank: int, line: str) -> None:
        text = f"[rank {rank}] {line}" if len(ranks) > 1 else line
        if isinstance(display, LiveDisplay) and sys.stdout.isatty():
            display.print_line(text)
        else:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    tail = OutputTail(place.job_logs, ranks, show)
    following = asyncio.create_task(tail.follow(), name="output")
    supervision = Supervision(
        children,
        signals,
        display,
        address=address,
        token=launch.token,
        tls=launch.tls,
        shutdown_timeout_s=options.shutdown_timeout_s,
    )
    try:
        return await supervision.run()
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        tail.read_new(last=True)
