"""A network that is cut in the middle of an all-reduce: both sides get a named error within the limit that is set."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from network_namespaces import Machine, two_machines

HOSTS = ("10.203.77.1", "10.203.77.2")
LIMIT_S = 30.0


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    with two_machines(HOSTS) as made:
        yield made


class Rank:
    """A process of cut_link_rank.py on a machine."""

    def __init__(self, rank: int, machine: Machine, limits: tuple[float, float]) -> None:
        script = str(Path(__file__).with_name("cut_link_rank.py"))
        arguments = [str(rank), machine.host, *map(str, limits)]
        self.process = subprocess.Popen(
            [*machine.inside, sys.executable, "-u", script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._heard = b""

    def line(self) -> str:
        deadline = time.monotonic() + LIMIT_S
        assert self.process.stdout is not None
        while b"\n" not in self._heard:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"nothing within {LIMIT_S} s"
            part = os.read(self.process.stdout.fileno(), 65536)
            assert part, "it has ended"
            self._heard += part
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()

    def hear(self, address: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{address}\n".encode())

    def failure(self) -> str:
        while (line := self.line()) == "added":
            pass
        return line


@pytest.mark.parametrize(
    ("user_timeout_s", "operation_s", "named"),
    [(1.0, 10 * LIMIT_S, "LinkClosed"), (10 * LIMIT_S, 3.0, "DeadlineExceeded")],
    ids=["user timeout", "timeout of the operation"],
)
def test_a_cut_in_the_middle_of_an_all_reduce_is_an_error_in_time(
    machines: tuple[Machine, Machine], user_timeout_s: float, operation_s: float, named: str
) -> None:
    limits = (user_timeout_s, operation_s)
    ranks = [Rank(rank, machine, limits) for rank, machine in enumerate(machines)]
    try:
        addresses = [rank.line() for rank in ranks]
        for rank, address in zip(ranks, reversed(addresses), strict=True):
            rank.hear(address)
        for rank in ranks:
            assert rank.line() == rank.line() == "added"
        machines[0].cut()
        for number, rank in enumerate(ranks):
            failure = rank.failure()
            assert failure.startswith(named), failure
            assert f"worker {1 - number}" in failure
            assert rank.process.wait(LIMIT_S) == 0
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.communicate(timeout=LIMIT_S)
