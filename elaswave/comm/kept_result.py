"""The result of the last operation, for ranks that miss it: received parts as received, copies of the rest."""

from collections.abc import Sequence

import torch
from torch import Tensor

from elaswave.comm.collectives.commands import Placed


class KeptResult:
    """One result at a time. What it holds does not change when the user's tensors do."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []  # bytes, one after the other
        self._copies = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Of the whole result; 0 where none is kept."""
        return sum(part.numel() for part in self._parts)

    def whole(self) -> Tensor:
        """All of it as bytes, in memory of its own."""
        return torch.cat(self._parts) if self._parts else torch.empty(0, dtype=torch.uint8)

    def replace(self, result: Tensor | None, placed: Sequence[Placed]) -> None:
        """Keep this one, flat, instead. placed: what was received of it, in any order; other places are ignored."""
        self._parts = []
        if result is None or not result.nbytes:
            return
        if len(placed) == 1:
            place, received = placed[0]
            if place.nbytes == result.nbytes and place.data_ptr() == result.data_ptr():
                self._parts.append(received.view(torch.uint8))
                return
        content = result.view(torch.uint8)
        parts = _by_start(content, placed) if placed else []
        if not parts:
            self._parts.append(self._room(content.numel())[: content.numel()].copy_(content))
            return
        cuts = [0, *(edge for start, part in parts for edge in (start, start + part.numel())), content.numel()]
        gaps = list(zip(cuts[::2], cuts[1::2], strict=True))
        room = self._room(sum(stop - start for start, stop in gaps))
        for index, (start, stop) in enumerate(gaps):
            if start < stop:
                copied, room = room[: stop - start], room[stop - start :]
                self._parts.append(copied.copy_(content[start:stop]))
            self._parts += [part for _, part in parts[index : index + 1]]

    def _room(self, nbytes: int) -> Tensor:
        """Memory that was never used before costs more than the copy."""
        if self._copies.numel() < nbytes:
            self._copies = torch.empty(nbytes, dtype=torch.uint8)
        return self._copies


def _by_start(content: Tensor, placed: Sequence[Placed]) -> list[tuple[int, Tensor]]:
    """Received parts that are within, as bytes, in the order in which they lie; none of two that overlap is twice."""
    found: list[tuple[int, Tensor]] = []
    end = 0
    for start, part in sorted(((part.place.data_ptr() - content.data_ptr(), part) for part in placed), key=_start_of):
        received = part.received.view(torch.uint8) if part.received.numel() else content[:0]
        if received.numel() and end <= start <= content.numel() - received.numel():
            found.append((start, received))
            end = start + received.numel()
    return found


def _start_of(found: tuple[int, Placed]) -> int:
    return found[0]
