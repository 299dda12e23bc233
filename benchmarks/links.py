"""Links between two processes: round trips of small frames, bandwidth of large ones, over Unix sockets and TCP.

    python benchmarks/links.py [--quick] [--json FILE]

Each round runs two gangs of two processes, one on links and one on bare blocking sockets, whose one thread does nothing
else and which have no framing, inbox or failure handling: the floor of this machine at that moment. A round trip is one
frame there and one back (median of many); bandwidth counts payload bytes of a run of frames with at most four
unanswered, into fresh memory, from the first send to the last answer. Figures are min / median / max over the rounds;
"of bare" is the median over the rounds of links / bare for bandwidth, bare / links for time: 1.0 would be for free.
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from elaswave.comm.inbox import Inbox, LinkItem, Received
from elaswave.comm.links import Links
from elaswave.core.ids import WorkerId

LIMIT_S = 60.0
PING, DATA, DONE, END = range(4)
DRIVER, ECHO = WorkerId(0), WorkerId(1)
MIB = 1 << 20
WINDOW = 4
BUFFER_BYTES = MIB

PINGS = {"round trip of 100 B": (100, 1000), "round trip of 64 KiB": (1 << 16, 250)}
RUNS = {"frames of 1 MiB": (MIB, 100), "frames of 16 MiB": (16 * MIB, 10), "frames of 64 MiB": (64 * MIB, 4)}


class Channel(Protocol):
    """One end of what is measured."""

    def send(self, kind: int, payload: NDArray[np.uint8] | None) -> None: ...

    def take(self) -> tuple[int, NDArray[np.uint8]]: ...

    def close(self) -> None: ...


class LinkChannel:
    """Links."""

    def __init__(self, me: WorkerId, address: str) -> None:
        self._peer = ECHO if me == DRIVER else DRIVER
        self._inbox: Inbox[LinkItem] = Inbox()
        self._links = Links(me, b"benchmark", self._inbox, payload_limit_bytes=64 * MIB)
        self.address = self._links.listen(address)
        self._frames = self._take_all()

    def meet(self, address: str) -> None:
        """Tell where the other end listens."""
        self._links.start()
        self._links.set_addresses({self._peer: address})

    def _take_all(self) -> Iterator[Received]:
        while self._inbox.wait(time.monotonic() + LIMIT_S):
            for item in self._inbox.take_all():
                if not isinstance(item, Received):
                    raise SystemExit(f"the other end is gone: {item}")
                yield item

    def send(self, kind: int, payload: NDArray[np.uint8] | None) -> None:
        self._links.send(self._peer, kind, b"", payload)

    def take(self) -> tuple[int, NDArray[np.uint8]]:
        frame = next(self._frames)
        return frame.kind, frame.payload

    def close(self) -> None:
        self._links.close(5.0)


class BareChannel:
    """A blocking socket and a header of 16 bytes."""

    def __init__(self, opened: socket.socket) -> None:
        opened.settimeout(LIMIT_S)
        if opened.family != socket.AF_UNIX:
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            opened.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
        self._socket = opened

    def send(self, kind: int, payload: NDArray[np.uint8] | None) -> None:
        size = 0 if payload is None else payload.size
        head = kind.to_bytes(8, "little") + size.to_bytes(8, "little")
        if payload is None or size <= 4096:
            self._socket.sendall(head + (b"" if payload is None else payload.tobytes()))
        else:
            self._socket.sendall(head)
            self._socket.sendall(payload.data)

    def take(self) -> tuple[int, NDArray[np.uint8]]:
        head = self._fill(np.empty(16, dtype=np.uint8)).tobytes()
        kind, size = (int.from_bytes(part, "little") for part in (head[:8], head[8:]))
        return kind, self._fill(np.empty(size, dtype=np.uint8))

    def _fill(self, payload: NDArray[np.uint8]) -> NDArray[np.uint8]:
        view, done = payload.data, 0
        while done < payload.size:
            done += self._socket.recv_into(view[done:])
        return payload

    def close(self) -> None:
        self._socket.close()


def echo(channel: Channel) -> None:
    """The other process: answers pings with pings and data with a short frame."""
    kind, payload = channel.take()
    while kind != END:
        channel.send(*((PING, payload) if kind == PING else (DONE, None)))
        kind, payload = channel.take()
    channel.close()


def ping_us(channel: Channel, nbytes: int, count: int) -> float:
    """Median round trip in microseconds."""
    payload = np.zeros(nbytes, dtype=np.uint8)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        channel.send(PING, payload)
        channel.take()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def bandwidth(channel: Channel, nbytes: int, count: int) -> float:
    """Payload in GB/s."""
    payload = np.zeros(nbytes, dtype=np.uint8)
    channel.send(DATA, payload)
    channel.take()
    start = time.perf_counter()
    for number in range(count):
        channel.send(DATA, payload)
        if number >= WINDOW - 1:
            channel.take()
    for _ in range(min(count, WINDOW - 1)):
        channel.take()
    return nbytes * count / (time.perf_counter() - start) / 1e9


def measure(channel: Channel, scale: int) -> dict[str, float]:
    """All figures of one gang; ends its echo."""
    ping_us(channel, 100, 100)
    figures = {what: ping_us(channel, nbytes, count * scale) for what, (nbytes, count) in PINGS.items()}
    figures |= {what: bandwidth(channel, nbytes, count * scale) for what, (nbytes, count) in RUNS.items()}
    channel.send(END, None)
    channel.close()
    return figures


def gang(driver: Callable[[], Channel], other: Callable[[], Channel], scale: int) -> dict[str, float]:
    """Fork the echo, then measure; no thread runs before."""
    pid = os.fork()
    if not pid:
        echo(other())
        os._exit(0)
    figures = measure(driver(), scale)
    os.waitpid(pid, 0)
    return figures


def links_round(transport: str, scale: int) -> dict[str, float]:
    """One gang on links; both listen before the fork, so each knows the other's address."""
    with tempfile.TemporaryDirectory() as folder:
        unix = transport == "unix"
        ends = [LinkChannel(me, f"unix:{folder}/{me}" if unix else "tcp:127.0.0.1:0") for me in (DRIVER, ECHO)]

        def ready(mine: LinkChannel, other: LinkChannel) -> LinkChannel:
            mine.meet(other.address)
            return mine

        figures = gang(lambda: ready(ends[0], ends[1]), lambda: ready(ends[1], ends[0]), scale)
        ends[1].close()
        return figures


def bare_round(transport: str, scale: int) -> dict[str, float]:
    """One gang on bare sockets."""
    if transport == "unix":
        near, far = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            near = socket.create_connection(server.getsockname())
            far, _ = server.accept()
    with near, far:
        return gang(lambda: BareChannel(near), lambda: BareChannel(far), scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; `links` and `bare` hold one figure a round."""

    transport: str
    what: str
    unit: str
    links: list[float]
    bare: list[float]

    def of_bare(self) -> float:
        """Median over the rounds; above 1: links are better."""
        ratios = [mine / floor for mine, floor in zip(self.links, self.bare, strict=True)]
        return statistics.median(1 / ratio if self.unit == "us" else ratio for ratio in ratios)


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 short rounds instead of 7 long ones")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to FILE")
    arguments = parser.parse_args()
    rounds, scale = (3, 1) if arguments.quick else (7, 4)
    rows = [
        Row(transport=transport, what=what, unit="us" if what in PINGS else "GB/s", links=[], bare=[])
        for transport in ("unix", "tcp")
        for what in (*PINGS, *RUNS)
    ]
    for _ in range(rounds):
        for transport in ("unix", "tcp"):
            links, bare = links_round(transport, scale), bare_round(transport, scale)
            for row in rows:
                if row.transport == transport:
                    row.links.append(links[row.what])
                    row.bare.append(bare[row.what])
    print(f"{'transport':<10}{'what':<22}{'unit':<6}{'min':>9}{'median':>9}{'max':>9}{'bare median':>13}{'of bare':>9}")
    for row in rows:
        spread = f"{min(row.links):>9.2f}{statistics.median(row.links):>9.2f}{max(row.links):>9.2f}"
        floor = f"{statistics.median(row.bare):>13.2f}{row.of_bare():>9.2f}"
        print(f"{row.transport:<10}{row.what:<22}{row.unit:<6}{spread}{floor}")
    print(f"{rounds} rounds, load average {os.getloadavg()[0]:.2f}, {os.cpu_count()} cores")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
