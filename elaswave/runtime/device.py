"""The device seam: random generators, and the way of tensors between device and host memory. CPU and CUDA."""

from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from elaswave.errors import ConfigError

DATA_ALIGNMENT_BYTES = 64
"""What torch's own CPU allocations have. Kernels may take other code paths, and give other bits, for less."""


class Device(Protocol):
    """Where a worker computes."""

    @property
    def torch_device(self) -> torch.device:
        """The device of parameters and activations."""

    def seed(self, key: int) -> None:
        """Seed the generators that layers draw from with a 64-bit key."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """The values in host memory, canonical (see `canonical`); the tensor itself where it is so already."""

    def from_host(self, tensor: Tensor) -> Tensor:
        """The values of a host tensor on this device, canonical; the tensor itself where it is so already."""


class CpuDevice:
    """Computes in host memory."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def seed(self, key: int) -> None:
        # The generator object: torch.manual_seed would also visit every other backend, at a hundred times the cost.
        torch.default_generator.manual_seed(key)

    def to_host(self, tensor: Tensor) -> Tensor:
        return canonical(tensor)

    def from_host(self, tensor: Tensor) -> Tensor:
        return canonical(tensor)


class CudaDevice:
    """Computes on one CUDA device; tensors travel through host memory."""

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)

    @property
    def torch_device(self) -> torch.device:
        return self._device

    def seed(self, key: int) -> None:
        torch.default_generator.manual_seed(key)
        torch.cuda.default_generators[self._device.index].manual_seed(key)

    def to_host(self, tensor: Tensor) -> Tensor:
        return canonical(tensor.to("cpu"))

    def from_host(self, tensor: Tensor) -> Tensor:
        return canonical(tensor.to(self._device))


def device_of(name: str, local_rank: int = 0) -> Device:
    """The device called "cpu", "cuda" (the one of this local rank) or "cuda:INDEX". ConfigError for any other name."""
    kind, _, index = name.partition(":")
    if kind == "cpu" and not index:
        return CpuDevice()
    if kind == "cuda" and (index.isdecimal() or name == "cuda"):
        return CudaDevice(int(index or local_rank))
    raise ConfigError(f"device {name!r} is not known: give cpu, cuda or cuda:INDEX")


def canonical(tensor: Tensor) -> Tensor:
    """The same values with row-major strides in aligned storage: what a received tensor looks like.

    Kernels choose by strides and alignment, so this makes a value that stayed here and one that came over a link give
    the same bits. Returns the tensor itself where nothing is to be done.
    """
    if is_canonical(tensor):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def is_canonical(tensor: Tensor) -> bool:
    """Whether `canonical` gives the tensor itself."""
    return tensor.stride() == _row_major(tensor.shape) and tensor.data_ptr() % DATA_ALIGNMENT_BYTES == 0


@lru_cache(maxsize=1024)
def _row_major(shape: torch.Size) -> tuple[int, ...]:
    """Strides of a fresh tensor. is_contiguous() would accept any stride at a dimension of length 1."""
    strides = [1] * len(shape)
    for dimension in range(len(shape) - 1, 0, -1):
        strides[dimension - 1] = strides[dimension] * max(1, shape[dimension])
    return tuple(strides)


def configure_numerics() -> None:
    """Fix what decides bits within a numeric class: one thread, deterministic kernels. Call once, at worker start.

    Another thread count changes the bits of matrix products.
    """
    torch.set_num_threads(1)
    # torch.use_deterministic_algorithms does this too, but imports torch's compiler, which takes seconds per worker.
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    # It would write NaN into every fresh tensor to expose reads of unwritten memory, at the cost of a pass over it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
