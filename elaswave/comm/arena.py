"""Arena: memory that processes of one host share. Anonymous, so that nothing stays behind whatever dies."""

import mmap
import os
import threading

import torch
from torch import Tensor

from elaswave.errors import ConfigError, PeerError

NAME_BYTES = 64
ARENA_BYTES = 16 << 20


class Arena:
    """Memory of this process that others open by `name`; it ends with the last process that has it open."""

    def __init__(self, nbytes: int) -> None:
        """Raises ConfigError where there is no memory, or no descriptor, for it."""
        self._file = -1
        self._lock = threading.Lock()
        try:
            self._file = os.memfd_create("elaswave-arena", os.MFD_CLOEXEC)
            os.ftruncate(self._file, nbytes)
            self.tensor = _map(self._file, nbytes)
        except OSError as error:
            self.close()
            raise ConfigError(f"no {nbytes} bytes of shared memory: {error}") from error
        self.name = f"{os.fstat(self._file).st_ino}:/proc/{os.getpid()}/fd/{self._file}"

    def close(self) -> None:
        """Nobody can open it any more; who has it open keeps it. Any thread; a second call does nothing."""
        with self._lock:
            file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def open_arena(name: str, nbytes: int) -> Tensor:
    """Map the arena of another process of this user.

    Raises PeerError where that has ended, where its numbers mean something else here (another PID namespace), or where
    there is no memory or descriptor left.
    """
    inode, _, path = name.partition(":")
    try:
        opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise PeerError(f"the shared memory {path} of a peer cannot be opened: {error}") from error
    try:
        found = os.fstat(opened)
        if (str(found.st_ino), found.st_size) != (inode, nbytes):
            raise PeerError(f"{path} is not the shared memory of {nbytes} bytes that a peer has announced")
        return _map(opened, nbytes)
    except OSError as error:
        raise PeerError(f"the shared memory {path} of a peer cannot be mapped: {error}") from error
    finally:
        os.close(opened)


def _map(opened: int, nbytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(opened, nbytes), dtype=torch.uint8)
