"""Append log of the in-process store: length-prefixed records with a checksum, synced one by one."""

import os
import struct
import zlib
from pathlib import Path

from elaswave.errors import ConfigError
from elaswave_controller.store.interface import MAX_KEY_BYTES, MAX_VALUE_BYTES, Entry

_HEADER = struct.Struct("<IQII")  # crc32 of what follows it, revision, length of key, length of value
_MAGIC = b"elaswave-log-1\n"


class AppendLog:
    """An open log file, owned by one store. Use `open_log`."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path

    def append(self, entry: Entry) -> None:
        """Write one entry and wait until it is on disk (fdatasync, about 0.2 ms). Raises OSError when it is not."""
        key = entry.key.encode()
        body = struct.pack("<QII", entry.revision, len(key), len(entry.value)) + key + entry.value
        record = struct.pack("<I", zlib.crc32(body)) + body
        view = memoryview(record)
        while view:
            view = view[os.write(self._descriptor, view) :]
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def open_log(path: Path) -> tuple[AppendLog, list[Entry]]:
    """Open or create the log at `path` and read it back.

    A record that was cut short by a crash ends the log: it and what follows is removed, as it was never acknowledged.
    Raises ConfigError where the file is something else.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o600)
    try:
        data = _read_all(descriptor)
        if not data:
            os.write(descriptor, _MAGIC)
            os.fdatasync(descriptor)
            return AppendLog(descriptor, path), []
        if not data.startswith(_MAGIC):
            raise ConfigError(f"{path} is not a store log of this version: remove it or give another path")
        entries, good = _parse(data)
        if good < len(data):
            os.ftruncate(descriptor, good)
            os.fdatasync(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return AppendLog(descriptor, path), entries


def _read_all(descriptor: int) -> bytes:
    chunks = []
    while chunk := os.read(descriptor, 1 << 20):
        chunks.append(chunk)
    return b"".join(chunks)


def _parse(data: bytes) -> tuple[list[Entry], int]:
    entries: list[Entry] = []
    position = len(_MAGIC)
    while position + _HEADER.size <= len(data):
        checksum, revision, key_bytes, value_bytes = _HEADER.unpack_from(data, position)
        end = position + _HEADER.size + key_bytes + value_bytes
        if key_bytes > MAX_KEY_BYTES or value_bytes > MAX_VALUE_BYTES or end > len(data):
            break
        if zlib.crc32(memoryview(data)[position + 4 : end]) != checksum:
            break
        start = position + _HEADER.size
        key = data[start : start + key_bytes].decode()
        entries.append(Entry(key=key, value=data[start + key_bytes : end], revision=revision))
        position = end
    return entries, position
