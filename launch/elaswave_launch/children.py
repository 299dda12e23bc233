"""Child processes of the launcher, tied to its life. No asyncio here: the children start before it is imported."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from elaswave.lifeline import end_with_parent

_TAIL_BYTES = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What to run. `name` is unique within the job; output goes to the file `log`."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path


class Child:
    """A running child. `start_children` makes them, waiting.end_children ends them."""

    def __init__(self, command: Command, process: subprocess.Popen[bytes]) -> None:
        self.name = command.name
        self.log = command.log
        self.pid = process.pid
        self._process = process
        self._pidfd = os.pidfd_open(process.pid)

    @property
    def running(self) -> bool:
        """Whether it has not ended yet; reaps it when it has."""
        return self._process.poll() is None

    @property
    def exit_code(self) -> int:
        """Of an ended child; negative: the signal that killed it."""
        return self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self._pidfd >= 0 and self.running:
            with suppress(ProcessLookupError):  # it has ended since
                signal.pidfd_send_signal(self._pidfd, number)

    @property
    def pidfd(self) -> int:
        """Becomes readable when the child has ended; belongs to this object."""
        return self._pidfd

    def close(self) -> None:
        """Let go of the pidfd. Idempotent."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def describe_end(self) -> str:
        """How it ended, with the last lines of its log."""
        code = self.exit_code
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        tail = self.tail()
        return f"{self.name} {how}" + (f"; its last lines:\n{tail}" if tail else "")

    def tail(self) -> str:
        """The end of its log."""
        try:
            with self.log.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - _TAIL_BYTES))
                return file.read().decode("utf-8", "replace").strip()
        except FileNotFoundError:
            return ""


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """Arguments that run one of our modules; the working folder is not searched for it."""
    return (sys.executable, "-P", "-m", module, *arguments)


def start_children(commands: Iterable[Command], is_over: Callable[[], bool] = lambda: False) -> list[Child]:
    """Start all, or those that are reached before `is_over`; in the main thread, whose end is the end of the children.

    Each child is the leader of its own process group, so that Ctrl-C reaches the launcher only. Where one cannot be
    started, the others are killed. Raises OSError.
    """
    children: list[Child] = []
    try:
        for command in commands:
            if is_over():
                break
            children.append(_start(command))
    except BaseException:
        for child in children:
            child.send(signal.SIGKILL)
        for child in children:
            _ = child.exit_code  # reaped; a killed child ends at once
            child.close()
        raise
    return children


def _start(command: Command) -> Child:
    with command.log.open("ab") as log:
        process = subprocess.Popen(
            command.arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(command.environment),
            process_group=0,
            # Between fork and exec in a process with one thread: the kernel ends the child with us from here on.
            preexec_fn=partial(end_with_parent, os.getpid()),  # noqa: PLW1509
        )
    return Child(command, process)
