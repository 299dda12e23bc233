"""A job whose ranks take each other for hosts of their own, so that they talk by TCP, as TLS."""

import os
from unittest.mock import patch

import torch
import torch.distributed as dist

from elaswave.comm import directory
from elaswave.comm.tls import TlsContexts
from elaswave.errors import EpochChanged
from tests.comm.process_group_place import Place, die, job, joined

ELEMENTS = 300_000


def _sum(place: Place) -> float:
    tensor = torch.full((ELEMENTS,), float(place.rank + 1))
    dist.all_reduce(tensor)
    assert bool((tensor == tensor[0]).all())
    return float(tensor[0])


@job
def sums_over_tls(place: Place) -> object:
    os.environ.update(place.arguments["variables"])
    with (
        patch.object(directory, "own_host", lambda: f"host{place.rank}"),
        patch.object(TlsContexts, "wrap", autospec=True, side_effect=TlsContexts.wrap) as wrapped,
        joined(place) as group,
    ):
        sums: list[float] = []
        while sums[-1:] != [float(sum(range(1, place.size)))]:
            try:
                with group.guard():
                    sums.append(_sum(place))
            except EpochChanged:
                group.reconfigure()
            if place.rank == place.size - 1:
                die()
        return [sums, wrapped.call_count > 0]
