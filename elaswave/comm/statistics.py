"""What has gone over the links, for reports."""

import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class KindTraffic:
    """Frames of one kind so far, and their bytes with header and meta."""

    kind: int
    frames: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStatistics:
    """Counts since the links were made.

    sent: frames that `send` took. incidents: PeerClosed reports of broken links. failed_dials: tries that came to
    nothing. refusals: connections that did not become links.
    """

    sent: tuple[KindTraffic, ...]
    received: tuple[KindTraffic, ...]
    dials: int
    accepted: int
    incidents: int
    failed_dials: int
    refusals: int


class TrafficCounter:
    """Frames and bytes by kind; any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_kind: dict[int, list[int]] = {}

    def add(self, kind: int, nbytes: int) -> None:
        """Count one frame."""
        with self._lock:
            try:
                counts = self._by_kind[kind]
            except KeyError:
                counts = self._by_kind[kind] = [0, 0]
            counts[0] += 1
            counts[1] += nbytes

    def snapshot(self) -> tuple[KindTraffic, ...]:
        """The counts now, in order of kind."""
        with self._lock:
            rows = sorted((kind, frames, nbytes) for kind, (frames, nbytes) in self._by_kind.items())
        return tuple(KindTraffic(kind=kind, frames=frames, bytes=nbytes) for kind, frames, nbytes in rows)
