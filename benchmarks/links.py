"""Links between two processes: round-trip time of small frames, bandwidth of large ones, over Unix sockets and TCP.

    python benchmarks/links.py [--quick] [--json FILE]

Each round runs one gang of two processes; figures are min / median / max over the rounds. A round trip is one frame
there and one back, both threads of both processes included. Bandwidth counts payload bytes of a run of frames with at
most four unanswered, from the first send until the last answer.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from elaswave.comm.inbox import Inbox, LinkItem, Received
from elaswave.comm.links import Links
from elaswave.core.ids import WorkerId

LIMIT_S = 60.0
PING, DATA, DONE, END = range(4)
DRIVER, ECHO = WorkerId(0), WorkerId(1)
TOKEN = b"benchmark"
WINDOW = 4
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table: figures of all rounds."""

    transport: str
    what: str
    unit: str
    figures: list[float]


def frames_of(inbox: Inbox[LinkItem]) -> Iterator[Received]:
    """Frames as they come; ends the process's part if a minute passes without one, or with the peer."""
    while inbox.wait(time.monotonic() + LIMIT_S):
        for item in inbox.take_all():
            if not isinstance(item, Received):
                return
            yield item


def open_links(me: WorkerId, address: str) -> tuple[Links, Inbox[LinkItem], str]:
    """Links that listen and run."""
    inbox: Inbox[LinkItem] = Inbox()
    links = Links(me, TOKEN, inbox, payload_limit_bytes=64 * MIB)
    given = links.listen(address)
    links.start()
    return links, inbox, given


def echo(address: str, report_fd: int, driver_fd: int) -> None:
    """The other process: answers pings with pings and data with a short frame."""
    links, inbox, given = open_links(ECHO, address)
    os.write(report_fd, given.encode())
    links.set_addresses({DRIVER: os.read(driver_fd, 4096).decode()})
    for frame in frames_of(inbox):
        if frame.kind == END:
            break
        if frame.kind == PING:
            links.send(DRIVER, PING, b"", frame.payload)
        else:
            links.send(DRIVER, DONE, b"")
    links.close(5.0)


class Driver:
    """The measuring process."""

    def __init__(self, links: Links, inbox: Inbox[LinkItem]) -> None:
        self._links = links
        self._frames = frames_of(inbox)

    def ping_us(self, nbytes: int, count: int) -> float:
        """Median round trip of a frame of `nbytes`, in microseconds."""
        payload = np.zeros(nbytes, dtype=np.uint8)
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self._links.send(ECHO, PING, b"", payload)
            next(self._frames)
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e6

    def bandwidth(self, nbytes: int, count: int) -> float:
        """Payload bytes per second, in GB/s."""
        payload = np.zeros(nbytes, dtype=np.uint8)
        self._links.send(ECHO, DATA, b"", payload)
        next(self._frames)
        start = time.perf_counter()
        unanswered = 0
        for _ in range(count):
            self._links.send(ECHO, DATA, b"", payload)
            unanswered += 1
            if unanswered == WINDOW:
                next(self._frames)
                unanswered -= 1
        for _ in range(unanswered):
            next(self._frames)
        return nbytes * count / (time.perf_counter() - start) / 1e9


def run_round(transport: str, quick: bool) -> dict[str, float]:
    """One gang of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        addresses = [f"unix:{folder}/{name}" if transport == "unix" else "tcp:127.0.0.1:0" for name in "ab"]
        report_r, report_w = os.pipe()
        driver_r, driver_w = os.pipe()
        pid = os.fork()  # no thread runs yet
        if not pid:
            echo(addresses[1], report_w, driver_r)
            os._exit(0)
        links, inbox, given = open_links(DRIVER, addresses[0])
        links.set_addresses({ECHO: os.read(report_r, 4096).decode()})
        os.write(driver_w, given.encode())
        driver = Driver(links, inbox)
        driver.ping_us(100, 100)
        scale = 1 if quick else 4
        figures = {
            "round trip of 100 B, us": driver.ping_us(100, 1000 * scale),
            "round trip of 64 KiB, us": driver.ping_us(1 << 16, 250 * scale),
            "1 MiB frames, GB/s": driver.bandwidth(MIB, 100 * scale),
            "16 MiB frames, GB/s": driver.bandwidth(16 * MIB, 10 * scale),
            "64 MiB frames, GB/s": driver.bandwidth(64 * MIB, 4 * scale),
        }
        links.send(ECHO, END, b"")
        links.close(5.0)
        os.waitpid(pid, 0)
        for fd in (report_r, report_w, driver_r, driver_w):
            os.close(fd)
        return figures


def main() -> None:
    """Run the rounds, transports in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 short rounds instead of 7 long ones")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to FILE")
    arguments = parser.parse_args()
    figures: dict[tuple[str, str], list[float]] = {}
    for _ in range(3 if arguments.quick else 7):
        for transport in ("unix", "tcp"):
            for what, figure in run_round(transport, arguments.quick).items():
                figures.setdefault((transport, what), []).append(figure)
    rows = [
        Row(transport=transport, what=what.split(", ")[0], unit=what.split(", ")[1], figures=found)
        for (transport, what), found in sorted(figures.items(), key=lambda entry: entry[0][0], reverse=True)
    ]
    print(f"{'transport':<10}{'what':<26}{'unit':<6}{'min':>10}{'median':>10}{'max':>10}")
    for row in rows:
        low, middle, high = min(row.figures), statistics.median(row.figures), max(row.figures)
        print(f"{row.transport:<10}{row.what:<26}{row.unit:<6}{low:>10.2f}{middle:>10.2f}{high:>10.2f}")
    print(f"load average {os.getloadavg()[0]:.2f}, {os.cpu_count()} cores")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
