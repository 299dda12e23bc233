"""A network that is cut in the middle of an all-reduce: both sides get a named error within the limit that is set."""

import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HOSTS = ("10.203.77.1", "10.203.77.2")
LIMIT_S = 30.0


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command to make network namespaces with")
    names = (f"elaswave{os.getpid()}a", f"elaswave{os.getpid()}b")
    made: list[str] = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        except OSError as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        for name, host in zip(names, HOSTS, strict=True):
            ip("-n", name, "address", "add", f"{host}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


class Rank:
    """A process of cut_link_rank.py in a namespace."""

    def __init__(self, rank: int, namespace: str, limits: tuple[float, float]) -> None:
        script = str(Path(__file__).with_name("cut_link_rank.py"))
        arguments = [str(rank), HOSTS[rank], *map(str, limits)]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, "-u", script, *arguments],
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
    namespaces: tuple[str, str], user_timeout_s: float, operation_s: float, named: str
) -> None:
    limits = (user_timeout_s, operation_s)
    ranks = [Rank(rank, name, limits) for rank, name in enumerate(namespaces)]
    try:
        addresses = [rank.line() for rank in ranks]
        for rank, address in zip(ranks, reversed(addresses), strict=True):
            rank.hear(address)
        for rank in ranks:
            assert rank.line() == rank.line() == "added"
        ip("-n", namespaces[0], "link", "set", "cable", "down")
        for number, rank in enumerate(ranks):
            failure = rank.failure()
            assert failure.startswith(named), failure
            assert f"worker {1 - number}" in failure
            assert rank.process.wait(LIMIT_S) == 0
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.communicate(timeout=LIMIT_S)
