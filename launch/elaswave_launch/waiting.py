"""Waits for child processes through their pidfds, and ends them."""

import asyncio
import os
import signal
import time
from collections.abc import Sequence

from elaswave_launch.children import Child

_KILL_LIMIT_S = 2.0


async def wait_child(child: Child) -> None:
    """Until it has ended; the caller limits the wait."""
    if not child.running:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    # A descriptor of its own: several tasks may wait for the same child.
    descriptor = os.dup(child.pidfd)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def end_children(children: Sequence[Child], grace_s: float) -> None:
    """SIGTERM, after `grace_s` SIGKILL; returns when all have ended or two seconds after SIGKILL."""
    for number, limit_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILL_LIMIT_S)):
        running = [child for child in children if child.running]
        for child in running:
            child.send(number)
        await wait_all(running, limit_s)


async def wait_all(children: Sequence[Child], limit_s: float) -> bool:
    """Wait until all have ended, at most `limit_s`; whether they have."""
    deadline = time.monotonic() + limit_s
    try:
        for child in children:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await wait_child(child)
    except TimeoutError:
        return all(not child.running for child in children)
    return True
