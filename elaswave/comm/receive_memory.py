"""Memory for received payloads, used again once nobody refers to it.

Fresh memory costs a page fault for every 4 KiB, as much as the copy out of the kernel: the C library gives large blocks
back to the system when they are freed.
"""

import sys
from collections import deque
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from elaswave.comm.frames import ALIGNMENT_BYTES, aligned, aligned_buffer

POOLED_BYTES: Final = 64 << 10
"""Smaller payloads get memory of their own, which the C library keeps."""

KEPT_BYTES: Final = 64 << 20
"""Of all blocks, used ones too; what goes beyond is not kept."""


class ReceiveMemory:
    """Blocks of one process's links. For one thread at a time; who uses a block may let go of it in any."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        """kept_bytes: limit of all blocks that are kept."""
        self._limit = kept_bytes
        self._kept = 0
        self._blocks: deque[NDArray[np.uint8]] = deque()  # used longest ago first; whole, so that views refer to them
        (self._unused,) = _references(deque([np.empty(1, dtype=np.uint8)]))

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """Uninitialised bytes that start at a multiple of 64; they are whoever's that refers to them."""
        if nbytes < POOLED_BYTES:
            return aligned(np.empty(nbytes + ALIGNMENT_BYTES - 1, dtype=np.uint8), nbytes)
        least, most = nbytes + ALIGNMENT_BYTES - 1, nbytes + nbytes // 4
        for index, references in enumerate(_references(self._blocks)):
            if references == self._unused and least <= self._blocks[index].size <= most:
                block = self._blocks[index]
                del self._blocks[index]
                self._blocks.append(block)
                return aligned(block, nbytes)
        made = aligned_buffer(nbytes)
        if isinstance(made.base, np.ndarray):
            self._keep(made.base)
        return made

    def _keep(self, block: NDArray[np.uint8]) -> None:
        """Keep it instead of others that are unused, if there is room then."""
        if block.size > self._limit:
            return
        unused = [index for index, count in enumerate(_references(self._blocks)) if count == self._unused]
        while self._kept + block.size > self._limit and unused:
            index = unused.pop()
            self._kept -= self._blocks[index].size
            del self._blocks[index]
        if self._kept + block.size <= self._limit:
            self._kept += block.size
            self._blocks.append(block)


def _references(blocks: Iterable[NDArray[np.uint8]]) -> list[int]:
    """To each block, with those that this takes itself."""
    return [sys.getrefcount(block) for block in blocks]
