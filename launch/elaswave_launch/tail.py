"""Shows what workers print: follows their output files in the log folder."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_INTERVAL_S = 0.25
_MAX_READ_BYTES = 1 << 20  # of one file at a time, so that a worker that prints a lot does not hold up the rest


@dataclass(slots=True)
class _File:
    path: Path
    position: int = 0
    rest: bytes = b""


class OutputTail:
    """Follows `<folder>/*/rank_<r>.out` for the chosen ranks and hands over whole lines."""

    def __init__(self, folder: Path, ranks: frozenset[int], show: Callable[[int, str], None]) -> None:
        self._folder = folder
        self._ranks = sorted(ranks)
        self._show = show
        self._files: dict[Path, _File] = {}

    async def follow(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            self.read_new()

    def read_new(self, *, last: bool = False) -> None:
        """Show what has been added; with `last`, also a line without an end."""
        for rank in self._ranks:
            for path in sorted(self._folder.glob(f"*/rank_{rank}.out")):
                self._read(rank, self._files.setdefault(path, _File(path)), last)

    def _read(self, rank: int, file: _File, last: bool) -> None:
        while True:
            with file.path.open("rb") as opened:
                opened.seek(file.position)
                data = opened.read(_MAX_READ_BYTES)
            file.position += len(data)
            *lines, file.rest = (file.rest + data).split(b"\n")
            for line in lines:
                self._show(rank, line.decode("utf-8", "replace"))
            if not last or not data:
                break
        if last and file.rest:
            self._show(rank, file.rest.decode("utf-8", "replace"))
            file.rest = b""
