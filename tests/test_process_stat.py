"""Whether a process is being ended, by what the kernel tells of it."""

import signal
import subprocess
import sys

import pytest

from elaswave.process_stat import Life, ProcessStat, is_dying
from held_end import held_end

LIMIT_S = 30.0


def stat(*, name: str = "python", flags: int = 0x400040, pending: int = 0) -> bytes:
    before = " ".join(["0"] * 5)
    between = " ".join(["7"] * 21)
    return f"12 ({name}) R {before} {flags} {between} {pending} 0 16781312 17642 0 0 0 17 1\n".encode()


@pytest.mark.parametrize(
    ("told", "dying"),
    [
        (stat(), False),
        (stat(name="a) R (b 1 2"), False),
        (stat(pending=0x100), True),
        (stat(name="a) R (b 1 2", pending=0x100), True),
        (stat(pending=0x4000), False),
        (stat(flags=0x40044C), True),
        (stat(flags=0x400240), True),
        (stat(flags=0x400044), False),
    ],
    ids=["lives", "name", "killed", "name-killed", "sigterm", "ends-by-signal", "dumps-core", "exits"],
)
def test_what_stat_tells(told: bytes, dying: bool) -> None:
    assert is_dying(told) is dying


def test_a_process_from_its_life_to_its_end() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child:
        found = ProcessStat.open(child.pid)
        assert found.life() is Life.RUNS
        with held_end(child.pid) as wait_for_begin:
            child.kill()
            wait_for_begin(LIMIT_S)
            assert found.life() is Life.DYING
        assert child.wait(LIMIT_S) == -signal.SIGKILL
        assert found.life() is Life.ENDED
        found.close()
