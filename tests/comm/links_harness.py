"""What the tests of links share: a worker's end in this process, an echoing worker in another, a raw dialler."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from elaswave.comm import hello
from elaswave.comm.addresses import LinkOptions, parse_address
from elaswave.comm.inbox import Inbox, LinkItem, PeerClosed, Received
from elaswave.comm.links import Links
from elaswave.core.ids import WorkerId

TOKEN = b"the token of this job"
LIMIT_S = 20.0  # far beyond what anything here takes, for a loaded machine
PAYLOAD_LIMIT = 64 << 20
STOP_KIND = 65535

ItemT = TypeVar("ItemT")


class End:
    """Links of one worker in this process, and what has come into its inbox."""

    def __init__(
        self,
        me: int,
        address: str,
        *,
        token: bytes = TOKEN,
        payload_limit_bytes: int = PAYLOAD_LIMIT,
        options: LinkOptions | None = None,
    ) -> None:
        self.me = WorkerId(me)
        self.inbox: Inbox[LinkItem] = Inbox()
        self.links = Links(self.me, token, self.inbox, payload_limit_bytes=payload_limit_bytes, options=options)
        self.address = self.links.listen(address)
        self.links.start()
        self.seen: list[LinkItem] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.links.close(0.0)

    def knows(self, *others: "End | Echo") -> Self:
        self.links.set_addresses({other.me: other.address for other in others})
        return self

    def next(self, kind: type[ItemT], limit_s: float = LIMIT_S, where: Callable[[ItemT], bool] | None = None) -> ItemT:
        """The first item of that type that was not taken so far; others stay."""
        deadline = time.monotonic() + limit_s
        while True:
            for item in self.seen:
                if isinstance(item, kind) and (where is None or where(item)):
                    self.seen.remove(item)
                    return item
            if not self.inbox.wait(deadline):
                raise AssertionError(f"no {kind.__name__} within {limit_s} s; there is {self.seen}")
            self.seen += self.inbox.take_all()

    def frames(self, count: int) -> list[Received]:
        return [self.next(Received) for _ in range(count)]

    def nothing_of(self, kind: type[LinkItem]) -> bool:
        self.seen += self.inbox.take_all()
        return not any(isinstance(item, kind) for item in self.seen)


def noise(nbytes: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def meet(one: End, other: End) -> None:
    """Both directions up, and known to be so."""
    for sender, receiver in ((one, other), (other, one)):
        sender.knows(receiver)
        sender.links.send(receiver.me, 0, b"meet")
        receiver.next(Received)


class Echo:
    """A worker in a process of its own that sends each frame back as it came."""

    def __init__(self, me: int, address: str, *, socket_buffer_bytes: int = 1 << 20) -> None:
        self.me = WorkerId(me)
        arguments = [str(me), address, str(socket_buffer_bytes)]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("links_echo.py")), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], LIMIT_S)
        assert ready, "the echoing process does not start"
        return self.process.stdout.readline().strip()

    def knows(self, other: End) -> Self:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{other.me} {other.address}\n")
        self.process.stdin.flush()
        assert self._line() == "known"
        return self

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def wait_stopped(self) -> None:
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()  # reaches a stopped process too
        self.process.communicate(timeout=LIMIT_S)


class RawDialler:
    """A connection to somebody's listener, as bytes."""

    def __init__(self, address: str) -> None:
        parsed = parse_address(address)
        family = socket.AF_UNIX if address.startswith("unix:") else socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.settimeout(LIMIT_S)
        self.socket.connect(parsed.target)
        if family == socket.AF_INET:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def read(self, count: int) -> bytes:
        """Exactly so many bytes, fewer if it hangs up."""
        data = b""
        try:
            while len(data) < count and (part := self.socket.recv(count - len(data))):
                data += part
        except ConnectionResetError:
            pass
        return data

    def challenged(self, sender: int, receiver: int) -> hello.Ends:
        """Read the challenge; what to say hello with as `sender`."""
        nonce = hello.read_challenge(self.read(hello.CHALLENGE_BYTES))
        return hello.Ends(
            token=TOKEN,
            sender=WorkerId(sender),
            receiver=WorkerId(receiver),
            listener_nonce=nonce,
            dialler_nonce=os.urandom(hello.NONCE_BYTES),
        )

    def join(self, sender: int, receiver: int) -> None:
        """A hello that is welcomed."""
        ends = self.challenged(sender, receiver)
        self.socket.sendall(hello.encode_hello(ends))
        hello.check_welcome(self.read(hello.WELCOME_BYTES), ends)

    def ended(self) -> bool:
        """Whether the other side hangs up, after whatever it still says."""
        self.read(1 << 20)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()


def closed_reason(end: End, peer: int) -> PeerClosed:
    """The report that the links of `end` with `peer` are down."""
    return end.next(PeerClosed, where=lambda item: item.peer == peer)
