"""Child processes of the launcher end with it, and in time."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launch_harness import all_gone

from elaswave_launch.children import Child, Command, start_children
from elaswave_launch.waiting import end_children, wait_all, wait_child

READY = "print('ready', flush=True)\n"
OBEDIENT = READY + "import signal; signal.pause()\n"
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + "while True: signal.pause()\n"


def command(tmp_path: Path, name: str, code: str) -> Command:
    return Command(
        name=name, arguments=(sys.executable, "-c", code), environment=dict(os.environ), log=tmp_path / f"{name}.log"
    )


def start(tmp_path: Path, **codes: str) -> list[Child]:
    children = start_children([command(tmp_path, name, code) for name, code in codes.items()])
    deadline = time.monotonic() + 30
    while any("ready" not in child.log.read_text() for child in children):
        assert time.monotonic() < deadline
    return children


def test_sigterm_first_and_sigkill_for_those_that_stay(tmp_path: Path) -> None:
    obedient, stubborn = children = start(tmp_path, obedient=OBEDIENT, stubborn=STUBBORN)
    began = time.monotonic()
    asyncio.run(end_children(children, 0.3))
    assert (obedient.exit_code, stubborn.exit_code) == (-signal.SIGTERM, -signal.SIGKILL)
    assert time.monotonic() - began < 2.0
    asyncio.run(end_children(children, 0.3))
    for child in children:
        child.send(signal.SIGKILL)
        child.close()


def test_no_more_are_started_once_it_is_over(tmp_path: Path) -> None:
    over = iter([False, True])
    [child] = start_children([command(tmp_path, str(number), OBEDIENT) for number in range(3)], lambda: next(over))
    child.send(signal.SIGKILL)
    assert asyncio.run(wait_all([child], 5.0))
    assert child.exit_code == -signal.SIGKILL
    child.close()


def test_several_tasks_wait_for_one_child(tmp_path: Path) -> None:
    async def body(child: Child) -> bool:
        waits = [asyncio.create_task(wait_child(child)) for _ in range(3)]
        assert not await wait_all([child], 0.05)
        waits[0].cancel()
        child.send(signal.SIGTERM)
        await asyncio.gather(*waits[1:])
        return await wait_all([child], 0.0)

    [child] = start(tmp_path, child=OBEDIENT)
    descriptors = len(os.listdir("/proc/self/fd"))
    assert asyncio.run(body(child))
    assert len(os.listdir("/proc/self/fd")) == descriptors
    child.close()


def test_children_lead_their_own_groups_and_have_no_input(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getpgid(0) == os.getpid(), repr(sys.stdin.read()), 'ready', flush=True)\n"
    children = start(tmp_path, one=code, two=code)
    assert [child.tail() for child in children] == ["True '' ready"] * 2
    asyncio.run(end_children(children, 1.0))
    for child in children:
        child.close()


def test_an_ending_is_described_with_the_end_of_the_log(tmp_path: Path) -> None:
    killed, failed = start(tmp_path, killed=OBEDIENT, failed=READY + "raise ValueError('x' * 5000 + 'the reason')")
    killed.send(signal.SIGKILL)
    asyncio.run(wait_all([killed, failed], 10.0))
    assert killed.describe_end() == "killed was killed by SIGKILL; its last lines:\nready"
    assert failed.describe_end().startswith("failed ended with exit code 1; its last lines:\n")
    assert failed.describe_end().endswith("the reason")
    assert len(failed.describe_end()) < 5000
    for child in (killed, failed):
        child.close()


def test_when_one_cannot_be_started_none_stays(tmp_path: Path) -> None:
    missing = Command(name="b", arguments=("/no/such/program",), environment={}, log=tmp_path / "b.log")
    before = set(psutil.Process().children())
    with pytest.raises(OSError, match="No such file"):
        start_children([command(tmp_path, "a", OBEDIENT), missing])
    started = [child for child in psutil.Process().children() if child not in before]
    assert all_gone(started, 5.0)


def test_children_die_with_a_killed_launcher(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
from elaswave_launch.children import Command, start_children
ignore = "import signal\\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\\nwhile True: signal.pause()"
commands = [Command(name=n, arguments=(sys.executable, "-c", ignore), environment=dict(os.environ),
                    log=Path({str(tmp_path)!r}) / n) for n in "abc"]
print(*[child.pid for child in start_children(commands)], flush=True)
signal.pause()
"""
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    children = [psutil.Process(int(pid)) for pid in launcher.stdout.readline().split()]
    assert len(children) == 3
    launcher.kill()
    launcher.wait(timeout=10)
    launcher.stdout.close()
    assert all_gone(children, 5.0)
