"""Progress page: shared memory in which a worker shows what it is doing, readable after its death.

One anonymous page (memfd) per worker: the agent makes it and hands it over the worker's socket, so it has no name and
is gone with the last process that maps it. One thread of the worker writes, the agent reads.

Every field is one aligned 64-bit word, so no word is ever torn. The masks exist twice, for even and for odd steps, each
with a stamp that names its step: a reader that finds the same stamp before and after has read the masks of one step.

What counts as a sign of life: every call of the writer. A worker that waits for others calls `alive()` at least once a
second while it waits: waiting is not a hang, only an instruction that does not end is one.
"""

import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from elaswave.core.events import Progress
from elaswave.core.ids import Step
from elaswave.errors import InvariantError, ProtocolError

PHASES: Final = ("", "forward", "backward", "reduce", "decide", "update", "publish", "checkpoint", "evaluate")
"""Phases that a page can show. "" means that the worker is not stepping: the hang watch leaves it alone."""

MAX_MICRO_BATCHES: Final = 4096
"""Micro-batches that the masks can hold; hops of later ones count as progress but are not marked."""

_WORD_BYTES = 8
_FORMAT_MARK = 0x454C5750_00000001  # "ELWP", version 1

# Word indices of the header.
_MARK, _STEP, _PHASE, _INSTRUCTIONS, _LAST_ALIVE, _DECLARED_UNTIL, _STAMPS = 0, 1, 2, 3, 4, 5, 6
_HEADER_WORDS = 64
_MASK_WORDS = MAX_MICRO_BATCHES // 64
_MASKS = 4  # forward begun, forward done, backward begun, backward done
_GENERATION_WORDS = _MASKS * _MASK_WORDS
_WORDS = _HEADER_WORDS + 2 * _GENERATION_WORDS
PAGE_BYTES: Final = -(-_WORDS * _WORD_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
_CLEAR = bytes(_GENERATION_WORDS * _WORD_BYTES)

_PHASE_CODES = {name: code for code, name in enumerate(PHASES)}
_NANOSECONDS = 1_000_000_000
_READ_ATTEMPTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SignsOfLife:
    """What the hang watch needs of a page. CLOCK_MONOTONIC seconds.

    declared_until: a long operation was announced up to this time; 0 where none is.
    """

    last_alive_at: float
    declared_until: float
    stepping: bool


class ProgressWriter:
    """The worker's side; used by one thread. Each call costs about a microsecond."""

    __slots__ = ("_declared", "_mapping", "_words")

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self._words = memoryview(mapping).cast("Q")
        self._declared = 0

    @classmethod
    def open(cls, descriptor: int) -> "ProgressWriter":
        """Map the page behind `descriptor`, which the caller may close then. Raises ProtocolError if it is none."""
        size = os.fstat(descriptor).st_size
        if size != PAGE_BYTES:
            raise ProtocolError(f"progress page has {size} bytes, expected {PAGE_BYTES}: agent of another version?")
        writer = cls(mmap.mmap(descriptor, PAGE_BYTES))
        if writer._words[_MARK] != _FORMAT_MARK:
            raise ProtocolError("progress page has an unknown format: agent of another version?")
        return writer

    def begin(self, step: Step, phase: str) -> None:
        """The worker enters `phase` of `step`; phase "" where it stops stepping."""
        words = self._words
        code = _PHASE_CODES.get(phase)
        if code is None:
            raise InvariantError(f"phase {phase!r} is not known to the progress page: use one of {PHASES}")
        if words[_STAMPS + (step & 1)] < step + 1:
            self._clear(step)
        words[_STEP] = step
        words[_PHASE] = code
        words[_INSTRUCTIONS] += 1
        words[_LAST_ALIVE] = time.monotonic_ns()

    def hop(self, step: Step, micro_batch: int, backward: bool, done: bool) -> None:
        """A hop of one micro-batch begins, or (`done`) has ended. Hops of a step before the last two are not marked."""
        words = self._words
        parity = step & 1
        if words[_STAMPS + parity] < step + 1:
            self._clear(step)
        if words[_STAMPS + parity] == step + 1 and micro_batch < MAX_MICRO_BATCHES:
            mask = (backward << 1) | done
            words[_HEADER_WORDS + parity * _GENERATION_WORDS + mask * _MASK_WORDS + (micro_batch >> 6)] |= 1 << (
                micro_batch & 63
            )
        words[_INSTRUCTIONS] += 1
        words[_LAST_ALIVE] = time.monotonic_ns()

    def alive(self) -> None:
        """A sign of life without progress: called while waiting for others."""
        self._words[_LAST_ALIVE] = time.monotonic_ns()

    @contextmanager
    def long_operation(self, limit_s: float) -> Iterator[None]:
        """Announce that no sign of life may come for `limit_s` seconds; an inner announcement rules while it lasts."""
        outer = self._declared
        now = time.monotonic_ns()
        self._declared = now + int(limit_s * _NANOSECONDS)
        self._words[_DECLARED_UNTIL] = self._declared
        self._words[_LAST_ALIVE] = now
        try:
            yield
        finally:
            self._declared = outer
            # First the sign of life: a reader must not find the announcement gone and the sign still old.
            self._words[_LAST_ALIVE] = time.monotonic_ns()
            self._words[_DECLARED_UNTIL] = outer

    def close(self) -> None:
        """Unmap the page, which says from now on that the worker is not stepping."""
        self._words[_PHASE] = 0
        self._words.release()
        self._mapping.close()

    def _clear(self, step: Step) -> None:
        words = self._words
        parity = step & 1
        words[_STAMPS + parity] = 0
        start = (_HEADER_WORDS + parity * _GENERATION_WORDS) * _WORD_BYTES
        self._mapping[start : start + len(_CLEAR)] = _CLEAR
        words[_STAMPS + parity] = step + 1


class ProgressReader:
    """The agent's side: owns the page and its descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._mapping = mmap.mmap(descriptor, PAGE_BYTES)
        self._words = memoryview(self._mapping).cast("Q")

    @classmethod
    def create(cls) -> "ProgressReader":
        """Make a page of zeros whose last sign of life is now."""
        # The size is sealed: a worker that cut the page short would kill the agent by SIGBUS.
        descriptor = os.memfd_create("elaswave-progress", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, PAGE_BYTES)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        reader = cls(descriptor)
        reader._words[_MARK] = _FORMAT_MARK
        reader._words[_LAST_ALIVE] = time.monotonic_ns()
        return reader

    @property
    def descriptor(self) -> int:
        """To be handed to the worker; stays owned here."""
        return self._descriptor

    def signs(self) -> SignsOfLife:
        """The fields that the hang watch needs."""
        words = self._words
        # Read in the opposite order of writing in long_operation.
        declared = words[_DECLARED_UNTIL]
        return SignsOfLife(
            last_alive_at=words[_LAST_ALIVE] / _NANOSECONDS,
            declared_until=declared / _NANOSECONDS,
            stepping=words[_PHASE] != 0,
        )

    def read(self) -> tuple[Progress, float]:
        """The newest step's progress, and the last sign of life in CLOCK_MONOTONIC seconds.

        Where the writer was stopped inside the clearing of a step's masks, these are empty, as no hop had begun.
        """
        words = self._words
        alive_at = words[_LAST_ALIVE] / _NANOSECONDS
        step = words[_STEP]
        code = words[_PHASE]
        masks = self._masks(step)
        progress = Progress(
            step=Step(step),
            phase=PHASES[code] if code < len(PHASES) else f"unknown phase {code}",
            instructions=words[_INSTRUCTIONS],
            forward_begun=masks[0],
            forward_done=masks[1],
            backward_begun=masks[2],
            backward_done=masks[3],
        )
        return progress, alive_at

    def close(self) -> None:
        """Unmap the page and close its descriptor."""
        self._words.release()
        self._mapping.close()
        os.close(self._descriptor)

    def _masks(self, step: int) -> tuple[int, int, int, int]:
        parity = step & 1
        size = _MASK_WORDS * _WORD_BYTES
        start = (_HEADER_WORDS + parity * _GENERATION_WORDS) * _WORD_BYTES
        for _ in range(_READ_ATTEMPTS):
            before = self._words[_STAMPS + parity]
            raw = self._mapping[start : start + _MASKS * size]
            if before == step + 1 and self._words[_STAMPS + parity] == before:
                forward_begun, forward_done, backward_begun, backward_done = (
                    int.from_bytes(raw[index * size : (index + 1) * size], "little") for index in range(_MASKS)
                )
                return forward_begun, forward_done, backward_begun, backward_done
        return 0, 0, 0, 0
