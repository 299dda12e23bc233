"""Arena: memory that processes of one host share. Anonymous, so that nothing stays behind whatever dies."""

import mmap
import os

import torch
from torch import Tensor

from elaswave.errors import ConfigError, PeerError

PATH_BYTES = 64
ARENA_BYTES = 16 << 20


class Arena:
    """Memory of this process that others open by `path`; it ends with the last process that has it open."""

    def __init__(self, nbytes: int) -> None:
        self._file = os.memfd_create("elaswave-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._file, nbytes)
            self.tensor = _map(self._file, nbytes)
        except OSError as error:
            os.close(self._file)
            raise ConfigError(f"no {nbytes} bytes of shared memory: {error}") from error
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"

    def close(self) -> None:
        """Nobody can open it any more; who has it open keeps it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def open_arena(path: str, nbytes: int) -> Tensor:
    """Map the arena of another process of this user. Raises PeerError where that has ended or has less."""
    try:
        opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise PeerError(f"the shared memory {path} of a peer cannot be opened: {error}") from error
    try:
        found = os.fstat(opened).st_size
        if found != nbytes:
            raise PeerError(f"the shared memory {path} of a peer has {found} bytes, not {nbytes}")
        return _map(opened, nbytes)
    finally:
        os.close(opened)


def _map(opened: int, nbytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(opened, nbytes), dtype=torch.uint8)
