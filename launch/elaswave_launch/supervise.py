"""Watches a started job to its end: the controller's stream, the children, signals."""

import asyncio
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from elaswave.certificates import TlsFiles
from elaswave.core.status import Finished
from elaswave.errors import PeerError
from elaswave_launch.children import Child
from elaswave_launch.display import Display
from elaswave_launch.signals import Signals
from elaswave_launch.waiting import end_children, wait_all, wait_child
from elaswave_launch.wire import Operator

FAILED = 1
_SIGNAL_BASE = 128  # as shells report it
CONTROLLER, ZYGOTE, AGENT = "controller", "zygote", "agent"
"""Names of children; agents have a node behind theirs."""

_ZYGOTE_UNAVAILABLE = 3  # elaswave.runtime.zygote.EXIT_UNAVAILABLE; agents go on without it
_NEWS_LIMIT_S = 2.0  # for the last message of a controller that has ended
_LEAVE_LIMIT_S = 4.0  # agents end their workers within 3 s of the controller's word
_AGENT_GRACE_S = 3.0
_SIGNAL_GRACE_S = 0.4  # with --shutdown-timeout 4, everything has ended within 5 s of a signal
_WATCH_AGAIN_S = 0.5  # pause before a lost stream is opened again
_NOTICE_S = 5.0  # without a word of the controller


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a job ended. `message` may have many lines; empty where all is well."""

    exit_code: int
    message: str = ""


class Supervision:
    """One job on this machine. `children` are the launcher's; it ends them all, whatever happens."""

    def __init__(
        self,
        children: Sequence[Child],
        signals: Signals,
        display: Display,
        *,
        address: str,
        token: str,
        tls: TlsFiles | None,
        shutdown_timeout_s: float,
    ) -> None:
        self._children = tuple(children)
        self._signals = signals
        self._display = display
        self._address = address
        self._token = token
        self._tls = tls
        self._shutdown_timeout_s = shutdown_timeout_s
        self._signalled = asyncio.Event()
        self._finished: Finished | None = None
        self._lost_news = ""
        self._news = asyncio.Event()

    async def run(self) -> Ending:
        """Returns when the job is over and every child has ended."""
        # From inside a signal handler, only this call wakes a loop that waits for something else.
        self._signals.notify(partial(asyncio.get_running_loop().call_soon_threadsafe, self._signalled.set))
        watching = asyncio.create_task(self._watch(), name="watch")
        grace_s = _AGENT_GRACE_S
        try:
            ending = await self._first_ending(watching)
            if ending is None:
                grace_s = _SIGNAL_GRACE_S
                ending = await self._end_by_signal()
            elif self._finished is not None:
                await wait_all([child for child in self._children if child.name != ZYGOTE], _LEAVE_LIMIT_S)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            # Agents first: they end their workers in order. The zygote's end is the end of workers that are left.
            await end_children(self._agents, grace_s)
            await end_children(self._children, _SIGNAL_GRACE_S)
        return ending

    @property
    def _agents(self) -> list[Child]:
        return [child for child in self._children if child.name.startswith(AGENT)]

    async def _signal(self) -> None:
        """Until a signal comes that has not been waited for yet."""
        await self._signalled.wait()
        self._signalled.clear()

    async def _watch(self) -> None:
        """Until the job has finished. A stream that was cut off is opened again."""
        text = f"waiting for the controller at {self._address}"
        notice = asyncio.get_running_loop().call_later(_NOTICE_S, self._display.print_line, text)
        try:
            while self._finished is None:
                await self._watch_once(notice)
                await asyncio.sleep(0.0 if self._finished else _WATCH_AGAIN_S)
        finally:
            notice.cancel()

    async def _watch_once(self, notice: asyncio.TimerHandle) -> None:
        operator = Operator(self._address, self._token, self._tls)
        try:
            async for item in operator.watch():
                notice.cancel()
                self._display.show(item)
                if isinstance(item, Finished):
                    self._finished = item
                    self._news.set()
        except PeerError as error:
            self._lost_news = str(error)
        finally:
            await operator.close()

    async def _first_ending(self, watching: asyncio.Task[None]) -> Ending | None:
        """How the job ended by itself; None where a signal came first."""
        signalled = asyncio.create_task(self._signal(), name="signal")
        waits = {child: asyncio.create_task(wait_child(child), name=child.name) for child in self._children}
        judged: set[Child] = set()
        try:
            while True:
                pending = {task for task in (signalled, watching, *waits.values()) if not task.done()}
                await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if signalled.done():
                    return None
                if watching.done() and not watching.cancelled() and (error := watching.exception()) is not None:
                    raise error
                ended = [child for child, task in waits.items() if task.done()]
                ending = self._told() or await self._judge([child for child in ended if child not in judged], ended)
                if ending is not None:
                    return ending
                judged.update(ended)
        finally:
            tasks = [signalled, *waits.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _told(self) -> Ending | None:
        if self._finished is None:
            return None
        return Ending(exit_code=self._finished.exit_code, message=self._finished.message)

    async def _judge(self, news: Sequence[Child], ended: Sequence[Child]) -> Ending | None:
        """What the end of some children means for the job; None: it goes on."""
        for child in news:
            if child.name == ZYGOTE and child.exit_code == _ZYGOTE_UNAVAILABLE:
                why = child.tail().rpartition("\n")[2]
                self._display.print_line(f"workers cannot be forked, they are started from scratch instead: {why}")
            elif child.name == ZYGOTE:
                return Ending(exit_code=FAILED, message=child.describe_end())
            elif child.name == CONTROLLER or all(agent in ended for agent in self._agents):
                return await self._last_word(child)
            else:
                # One node of several: the controller sees it at once and decides.
                self._display.print_line(f"{child.name} is gone (pid {child.pid})")
        return None

    async def _last_word(self, child: Child) -> Ending:
        # What the controller said last may still be on its way.
        with suppress(TimeoutError):
            async with asyncio.timeout(_NEWS_LIMIT_S):
                await self._news.wait()
        if told := self._told():
            return told
        code = child.exit_code if child.exit_code > 0 else FAILED
        return Ending(exit_code=code, message="\n".join(filter(None, (child.describe_end(), self._lost_news))))

    async def _end_by_signal(self) -> Ending:
        """Ask the controller, or our agents where it is elsewhere, to end; a second signal ends the patience."""
        number = self._signals.first or signal.SIGTERM
        self._display.print_line(f"{number.name}: ending the job")
        others = [child for child in self._children if child.name != ZYGOTE]
        asked = [child for child in others if child.name == CONTROLLER] or others
        for child in asked:
            child.send(signal.SIGTERM)
        waiting = asyncio.create_task(wait_all(others, self._shutdown_timeout_s))
        again = asyncio.create_task(self._signal())
        await asyncio.wait({waiting, again}, return_when=asyncio.FIRST_COMPLETED)
        for task in (waiting, again):
            task.cancel()
        await asyncio.gather(waiting, again, return_exceptions=True)
        return Ending(exit_code=_SIGNAL_BASE + number, message=f"ended by {number.name}")
