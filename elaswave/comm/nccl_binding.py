"""nccl4py, NVIDIA's Python binding of NCCL, as the library behind native communicators.

Not a dependency: imported when asked for. Its calls were compared with the sources of nccl4py 0.6.0 and were never run:
there was no GPU. See docs/communicators.md.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from elaswave.core.native_edits import NativeAbilities, NativeLibrary, NativeVersion, abilities_of
from elaswave.errors import ConfigError, PeerError

if TYPE_CHECKING:
    from types import ModuleType

Result = TypeVar("Result")

UNIQUE_ID_BYTES = 128
IN_PROGRESS = 7
"""ncclInProgress; ncclSuccess is 0."""
SHRINK_DEFAULT, SHRINK_ABORT = 0, 1


class Nccl4PyCommunicator(Protocol):
    """What is used of nccl.core.Communicator."""

    @property
    def is_valid(self) -> bool: ...
    def shrink(self, exclude_ranks: list[int], *, flag: int) -> "Nccl4PyCommunicator": ...
    def get_unique_id(self) -> "Nccl4PyUniqueId": ...
    def grow(
        self, nranks: int, unique_id: "Nccl4PyUniqueId | None", *, rank: int | None, config: object | None
    ) -> "Nccl4PyCommunicator": ...
    def revoke(self) -> None: ...
    def abort(self) -> None: ...
    def get_async_error(self) -> int: ...
    def allreduce(self, sendbuf: Tensor, recvbuf: Tensor, op: object, *, stream: int) -> None: ...


class Nccl4PyUniqueId(Protocol):
    """What is used of nccl.core.UniqueId."""

    @property
    def as_bytes(self) -> bytes: ...


class Nccl4Py:
    """nccl.core as an NcclLibrary, for one CUDA device of this process."""

    def __init__(self, core: "ModuleType", bindings: "ModuleType", library: NativeLibrary, device: int) -> None:
        """core: nccl.core. bindings: nccl.bindings.nccl. library: what they are linked to. Use `load`."""
        self._core = core
        self._bindings = bindings
        self._library = library
        self._device = device

    @classmethod
    def load(cls, device: int, library: NativeLibrary = "nccl") -> "Nccl4Py":
        """Import nccl4py for this CUDA device. Raises ConfigError where it, or the library, is not installed."""
        try:
            core, bindings = importlib.import_module("nccl.core"), importlib.import_module("nccl.bindings.nccl")
            bindings.get_version()
        except (ImportError, RuntimeError) as error:
            raise ConfigError(
                f"native communicators need nccl4py and libnccl, which cannot be loaded ({error}): "
                "install them with 'pip install nccl4py[cu13]', or [cu12] for CUDA 12"
            ) from error
        return cls(core, bindings, library, device)

    @property
    def abilities(self) -> NativeAbilities:
        return abilities_of(self._library, version_of(self._call(lambda: int(self._bindings.get_version()))))

    def unique_id(self, parent: Nccl4PyCommunicator | None) -> bytes:
        make = self._core.get_unique_id if parent is None else parent.get_unique_id
        return bytes(self._call(lambda: make().as_bytes))

    def init_rank(self, size: int, rank: int, unique_id: bytes) -> Nccl4PyCommunicator:
        identity = self._identity(unique_id)
        with torch.cuda.device(self._device):
            made: Nccl4PyCommunicator = self._call(
                lambda: self._core.Communicator.init(size, rank, identity, config=self._config())
            )
        return made

    def shrink(
        self, parent: Nccl4PyCommunicator, excluded: tuple[int, ...], *, abort_in_flight: bool
    ) -> Nccl4PyCommunicator:
        flag = SHRINK_ABORT if abort_in_flight else SHRINK_DEFAULT
        return self._call(lambda: parent.shrink(list(excluded), flag=flag))

    def revoke(self, communicator: Nccl4PyCommunicator) -> None:
        self._call(communicator.revoke)

    def grow(
        self, parent: Nccl4PyCommunicator | None, size: int, rank: int | None, unique_id: bytes | None
    ) -> Nccl4PyCommunicator:
        origin: Nccl4PyCommunicator = self._core.Communicator() if parent is None else parent
        identity = None if unique_id is None else self._identity(unique_id)
        config = self._config() if parent is None else None  # a member's is that of its parent
        with torch.cuda.device(self._device):
            return self._call(lambda: origin.grow(size, identity, rank=rank, config=config))

    def in_progress(self, communicator: Nccl4PyCommunicator) -> bool:
        if not communicator.is_valid:
            return True  # a child has no address before it is whole
        state = self._call(lambda: int(communicator.get_async_error()))
        if state not in (0, IN_PROGRESS):
            raise PeerError(f"NCCL: asynchronous error {state}: {self._core.get_error_string(state)}")
        return state == IN_PROGRESS

    def abort(self, communicator: Nccl4PyCommunicator) -> None:
        self._call(communicator.abort)

    def all_reduce(self, communicator: Nccl4PyCommunicator, tensor: Tensor) -> Callable[[], bool]:
        stream, given = torch.cuda.current_stream(tensor.device), tensor.detach()
        self._call(lambda: communicator.allreduce(given, given, self._core.SUM, stream=stream.cuda_stream))
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event.query

    def _config(self) -> object:
        return self._core.NCCLConfig(blocking=False)

    def _identity(self, unique_id: bytes) -> Nccl4PyUniqueId:
        if len(unique_id) != UNIQUE_ID_BYTES:
            raise PeerError(f"a unique id of {len(unique_id)} bytes was told; NCCL's have {UNIQUE_ID_BYTES}")
        found: Nccl4PyUniqueId = self._core.UniqueId.from_bytes(unique_id)
        return found

    def _call(self, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except (self._bindings.NCCLError, self._core.NcclInvalid, RuntimeError) as error:
            raise PeerError(f"NCCL: {error}") from error


def version_of(code: int) -> NativeVersion:
    """What ncclGetVersion tells, as major, minor and patch; from 2.9 on."""
    return code // 10000, code % 10000 // 100, code % 100
