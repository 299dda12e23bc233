"""Payloads in memory that processes of one host share: a frame then carries only where its payload lies.

The sender owns the memory: anonymous files (memfd) that receivers map by /proc/PID/fd, so nothing stays behind whatever
dies. A block is a line of flags, then data. Each frame that refers to a block has a flag of its own, which the receiver
sets when the last array that views the payload is gone. A block is used anew once nobody here uses it and every
receiver has set its flag or its process has ended: who is cut off but lives on never sees other data under its arrays.

Data is written before the frame goes to the kernel and flags are single bytes that only rise, so on x86-64 no further
fence is needed.
"""

import fcntl
import mmap
import os
import select
import struct
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from elaswave.core.ids import WorkerId
from elaswave.errors import LinkClosed, ProtocolError

DESCRIPTOR = struct.Struct("<IIQQQQ")
"""File descriptor in the sender, flag, bytes of the segment, start of the block, start and length of the payload."""

FLAGS = 64
"""Frames that may refer to one block before it is used anew; further ones are copied to another block."""

SEGMENT_BYTES = 64 << 20
GRAIN_BYTES = 4096
SETTLE_TRIES = 8
"""Blocks of a size, among the newest and among the oldest, that are looked at before memory is added."""

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""A file that cannot shrink: nobody who has it mapped can be sent SIGBUS by its owner."""

Bytes = NDArray[np.uint8]


class _Segment:
    """One anonymous file, mapped."""

    def __init__(self, nbytes: int) -> None:
        self.file = os.memfd_create("elaswave-payloads", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.file, nbytes)
            fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, SEALS)
            self.data: Bytes = np.frombuffer(mmap.mmap(self.file, nbytes), dtype=np.uint8)
        except OSError:
            os.close(self.file)
            raise
        self.address = _address_of(self.data)
        self.flags = self.data.data
        self.used = 0
        self.starts: list[int] = []
        self.blocks: list[_Block] = []

    def block_at(self, address: int) -> "_Block | None":
        """The block whose data has this address."""
        start = address - self.address
        if not 0 <= start < self.used:
            return None
        return self.blocks[bisect_right(self.starts, start) - 1]


@dataclass(slots=True, kw_only=True)
class _Block:
    """start: of its flags in the segment; data follows. sent: who was given which flag."""

    segment: _Segment
    start: int
    capacity: int
    sent: list[WorkerId] = field(default_factory=list)

    def read(self) -> bytes:
        """The flags of who was sent it: 1 where it is read, else 0."""
        return bytes(self.segment.flags[self.start : self.start + len(self.sent)])

    @property
    def is_read(self) -> bool:
        """Whether all who were sent it have read it."""
        start, count = self.start, len(self.sent)
        return self.segment.flags[start] == 1 if count == 1 else 0 not in self.segment.flags[start : start + count]

    def clear(self) -> None:
        """Nobody was sent it."""
        self.segment.flags[self.start : self.start + len(self.sent)] = bytes(len(self.sent))
        self.sent.clear()


class _Lease:
    """Memory that numpy views; `on_end` is called when the last view is gone, on whatever thread that happens."""

    __slots__ = ("__array_interface__", "_keep", "_on_end")

    def __init__(self, memory: Bytes, start: int, length: int, on_end: Callable[[], None]) -> None:
        self._keep = memory
        self._on_end = on_end
        address = _address_of(memory) + start
        self.__array_interface__ = {"data": (address, False), "shape": (length,), "typestr": "|u1", "version": 3}

    def __del__(self) -> None:
        self._on_end()


class PayloadPool:
    """Memory of this process whose payloads peers on the same host read in place.

    Memory is added as needed and used again, never given back before `close`: steps repeat, and touched pages are worth
    more than free ones. Any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._segments: list[_Segment] = []
        self._free: dict[int, deque[_Block]] = {}
        self._returned: deque[_Block] = deque()  # appended by whoever drops the last view, without the lock
        self._processes: dict[WorkerId, int] = {}
        self._ended: set[WorkerId] = set()
        self._closed = False

    def take(self, nbytes: int) -> Bytes | None:
        """`nbytes` of memory, not cleared, at a multiple of 64; its last view gives it back. None: there is none."""
        with self._lock:
            if self._closed:
                return None
            block = self._take(nbytes)
            if block is None:
                return None
            start = block.start + FLAGS
            return np.asarray(_Lease(block.segment.data, start, nbytes, lambda: self._returned.append(block)))

    def lend(self, payload: memoryview, peer: WorkerId, *, copy: bool = False) -> bytes | None:
        """What tells `peer` where these bytes lie, or with `copy`, or if they are elsewhere, a copy of them.

        None: no memory for it.
        """
        given = np.frombuffer(payload, dtype=np.uint8)
        address = _address_of(given)
        with self._lock:
            block = None if copy else self._block_at(address)
            if block is not None:
                return _enter(block, peer, address - block.segment.address, given.size)
            block = None if self._closed else self._take(given.size)
            if block is None:
                return None
        start = block.start + FLAGS
        block.segment.data[start : start + given.size] = given
        with self._lock:
            # Nobody here keeps it: it is free again as soon as the peer has read it.
            self._returned.append(block)
            return None if self._closed else _enter(block, peer, start, given.size)

    def _block_at(self, address: int) -> _Block | None:
        """The block that holds these bytes, if there is one with a flag left."""
        for segment in self._segments:
            block = segment.block_at(address)
            if block is not None:
                return block if len(block.sent) < FLAGS else None
        return None

    def connected(self, peer: WorkerId, process: int) -> None:
        """The peer's process: when it ends, what it had borrowed is free."""
        with self._lock:
            self._forget_process(peer)
            for known in list(self._processes):
                self._has_ended(known)  # closes what we hold of it: workers come and go
            try:
                self._processes[peer] = os.pidfd_open(process)
                self._ended.discard(peer)
            except ProcessLookupError:
                self._ended.add(peer)
            except OSError:
                # Another PID namespace, or no descriptor left: its end stays unknown, and what it had borrowed unused.
                self._ended.discard(peer)

    def close(self) -> None:
        """Lend no more. Peers keep what they have mapped; memory goes with its last view."""
        with self._lock:
            self._closed = True
            for peer in list(self._processes):
                self._forget_process(peer)
            for segment in self._segments:
                os.close(segment.file)
            self._segments.clear()
            self._free.clear()

    def _forget_process(self, peer: WorkerId) -> None:
        opened = self._processes.pop(peer, None)
        if opened is not None:
            os.close(opened)

    def _take(self, nbytes: int) -> _Block | None:
        while self._returned:
            block = self._returned.popleft()
            self._free.setdefault(block.capacity, deque()).append(block)
        capacity = -(-max(nbytes, 1) // GRAIN_BYTES) * GRAIN_BYTES
        free = self._free.setdefault(capacity, deque())
        # The newest first: its memory is in the caches still. Then the oldest, which most likely nobody reads.
        last = len(free) - 1
        newest = range(last - 1, max(-1, last - SETTLE_TRIES), -1)
        tries = (last, *range(min(SETTLE_TRIES, max(0, last))), *newest) if free else ()
        place = next((place for place in tries if free[place].is_read), None)
        if place is None:
            # Before memory is added, and not at every look: whether a process has ended takes a system call.
            place = next((place for place in tries if self._is_settled(free[place])), None)
        if place is None:
            return self._add(capacity)
        block = free[place]
        del free[place]
        block.clear()
        return block

    def _is_settled(self, block: _Block) -> bool:
        return all(flag or self._has_ended(peer) for flag, peer in zip(block.read(), block.sent, strict=True))

    def _has_ended(self, peer: WorkerId) -> bool:
        opened = self._processes.get(peer)
        if opened is not None and _is_readable(opened):
            self._forget_process(peer)
            self._ended.add(peer)
        return peer in self._ended

    def _add(self, capacity: int) -> _Block | None:
        wanted = FLAGS + capacity
        if not self._segments or self._segments[-1].used + wanted > self._segments[-1].data.size:
            try:
                self._segments.append(_Segment(max(SEGMENT_BYTES, wanted)))
            except OSError:
                return None
        segment = self._segments[-1]
        block = _Block(segment=segment, start=segment.used, capacity=capacity)
        segment.starts.append(block.start)
        segment.blocks.append(block)
        segment.used += wanted
        return block


def _enter(block: _Block, peer: WorkerId, start: int, length: int) -> bytes:
    """The descriptor of a frame to the peer, whose flag it is given; the block has one left."""
    flag = len(block.sent)
    block.sent.append(peer)
    return DESCRIPTOR.pack(block.segment.file, flag, block.segment.data.size, block.start, start, length)


def _address_of(memory: Bytes) -> int:
    return int(memory.__array_interface__["data"][0])


def _is_readable(opened: int) -> bool:
    poll = select.poll()
    poll.register(opened, select.POLLIN)
    return bool(poll.poll(0))


class PeerMemory:
    """What one process lends us: its segments, mapped as frames name them. For the thread that reads its frames."""

    def __init__(self, process: int) -> None:
        self._process = process
        self._segments: dict[int, Bytes] = {}

    def borrow(self, descriptor: bytes, limit_bytes: int) -> Bytes:
        """The payload of a frame, in place; the sender may use the memory again when its last view is gone.

        Raises ProtocolError where the descriptor points anywhere but into a segment, LinkClosed where the sender has
        ended before its segment was mapped.
        """
        if len(descriptor) != DESCRIPTOR.size:
            raise ProtocolError(f"a shared payload is described by {len(descriptor)} bytes, not {DESCRIPTOR.size}")
        file, flag, segment_bytes, block, start, length = DESCRIPTOR.unpack(descriptor)
        if length > limit_bytes:
            raise ProtocolError(f"a shared payload of {length} bytes is over the limit of {limit_bytes}")
        if flag >= FLAGS or start < block + FLAGS or start + length > segment_bytes:
            raise ProtocolError(
                f"a shared payload of {length} bytes at {start}, flag {flag}, block at {block} does not lie in a "
                f"segment of {segment_bytes} bytes"
            )
        memory = self._segments.get(file)
        if memory is None or memory.size != segment_bytes:
            memory = self._segments[file] = _map(self._process, file, segment_bytes)
        return np.asarray(_Lease(memory, start, length, _Raise(memory, block + flag)))


class _Raise:
    """Sets one flag."""

    __slots__ = ("_at", "_memory")

    def __init__(self, memory: Bytes, at: int) -> None:
        self._memory = memory
        self._at = at

    def __call__(self) -> None:
        self._memory[self._at] = 1


def _map(process: int, file: int, nbytes: int) -> Bytes:
    path = f"/proc/{process}/fd/{file}"
    try:
        opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise LinkClosed(f"the shared memory {path} of a peer cannot be opened: {error.strerror}") from error
    try:
        found = os.fstat(opened).st_size
        if found != nbytes or fcntl.fcntl(opened, fcntl.F_GET_SEALS) != SEALS:
            raise ProtocolError(f"{path} of a peer has {found} bytes: must be sealed memory of {nbytes}")
        return np.frombuffer(mmap.mmap(opened, nbytes), dtype=np.uint8)
    except OSError as error:
        raise LinkClosed(f"{path} of a peer cannot be mapped as its shared memory: {error.strerror}") from error
    finally:
        os.close(opened)
