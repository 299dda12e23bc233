"""Shows and supervises a job whose processes have been started."""

import asyncio
import sys
from collections.abc import Sequence

from elaswave_launch.children import Child
from elaswave_launch.commands import Place
from elaswave_launch.display import Display, LiveDisplay, open_display
from elaswave_launch.preflight import Launch
from elaswave_launch.signals import Signals
from elaswave_launch.supervise import Ending, Supervision
from elaswave_launch.tail import OutputTail


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
    return ending.exit_code


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
        shutdown_timeout_s=options.shutdown_timeout_s,
    )
    try:
        return await supervision.run()
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        tail.read_new(last=True)
