"""Where tensors that others will read are made: plain host memory, or what links share with peers on this host."""

from typing import Protocol

import torch
from torch import Tensor

from elaswave.comm.links import Links


class HostMemory(Protocol):
    """Makes flat tensors in host memory, values not set. What was sent from one must not change afterwards."""

    def __call__(self, elements: int, dtype: torch.dtype) -> Tensor: ...


def plain_memory(elements: int, dtype: torch.dtype) -> Tensor:
    """Memory of this process alone."""
    return torch.empty(elements, dtype=dtype)


class LinkMemory:
    """Memory from which links send without a copy where they can; it is used anew when nobody reads it any more."""

    def __init__(self, links: Links) -> None:
        self._links = links

    def __call__(self, elements: int, dtype: torch.dtype) -> Tensor:
        if not elements:
            return torch.empty(0, dtype=dtype)
        return torch.from_numpy(self._links.memory(elements * dtype.itemsize)).view(dtype)
