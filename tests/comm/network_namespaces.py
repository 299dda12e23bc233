"""Two network namespaces with a cable between them: two machines, as far as the network goes."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

LIMIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One of the two: its namespace, and its address on the cable."""

    namespace: str
    host: str

    @property
    def inside(self) -> tuple[str, ...]:
        """Put before a command, it runs there, under the same process id."""
        return ("ip", "netns", "exec", self.namespace)

    def cut(self) -> None:
        """Pull the cable out: nothing is told to either side."""
        _ip("-n", self.namespace, "link", "set", "cable", "down")

    def mend(self) -> None:
        """Plug the cable in again."""
        _ip("-n", self.namespace, "link", "set", "cable", "up")

    def reset_connections(self, other: "Machine", spared_port: int) -> int:
        """Break the TCP connections with the other one, but for those of a port; how many there were.

        Skips the test where the kernel cannot do that (CONFIG_INET_DIAG_DESTROY).
        """
        ends = ("dst", other.host, "and", "sport", "!=", str(spared_port), "and", "dport", "!=", str(spared_port))
        command = (*self.inside, "ss", "--kill", "--tcp", "--numeric", "--no-header", *ends)
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        if done.returncode or done.stderr:
            pytest.skip(f"connections cannot be reset here: {done.stderr.strip()}")
        return len(done.stdout.splitlines())


@contextmanager
def two_machines(hosts: Sequence[str]) -> Iterator[tuple[Machine, Machine]]:
    """They are removed at the end. Skips the test where this is not permitted."""
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command to make network namespaces with")
    first, second = (
        Machine(namespace=f"elaswave{os.getpid()}{letter}", host=host) for letter, host in zip("ab", hosts, strict=True)
    )
    made: list[str] = []
    try:
        try:
            for machine in (first, second):
                _ip("netns", "add", machine.namespace)
                made.append(machine.namespace)
            cable = ("link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second.namespace)
            _ip("-n", first.namespace, *cable)
        except OSError as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        for machine in (first, second):
            _ip("-n", machine.namespace, "address", "add", f"{machine.host}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", machine.namespace, "link", "set", device, "up")
        yield first, second
    finally:
        for name in made:
            _ip("netns", "del", name)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
