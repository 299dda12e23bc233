"""The calls that Nccl4Py makes, against methods with the parameters of nccl4py 0.6.0's. No NCCL has part."""

import sys
from types import ModuleType

import pytest

from elaswave.comm.nccl_binding import Nccl4Py, version_of
from elaswave.core.native_edits import NativeAbilities
from elaswave.errors import ConfigError, PeerError

NO_DEVICE = -1
ID = bytes(range(128))


class UniqueId:
    def __init__(self, content: bytes = ID) -> None:
        self.as_bytes = content

    @staticmethod
    def from_bytes(b: bytes) -> "UniqueId":
        return UniqueId(b)


class NCCLConfig:
    def __init__(self, *, blocking: bool | None = None) -> None:
        assert blocking is False


class NcclInvalid(Exception):
    pass


class NCCLError(Exception):
    pass


class Communicator:
    """Parameters as in nccl4py 0.6.0; what was called is told by `made_by`."""

    def __init__(self, ptr: int | None = None, made_by: object = None) -> None:
        self.is_valid = made_by is not None
        self.made_by = made_by
        self.state = 0
        self.calls: list[str] = []

    @classmethod
    def init(cls, nranks: int, rank: int, unique_id: UniqueId, config: NCCLConfig | None = None) -> "Communicator":
        assert isinstance(config, NCCLConfig)
        return cls(made_by=("init", nranks, rank, unique_id.as_bytes))

    def shrink(
        self, exclude_ranks: list[int] | None = None, config: NCCLConfig | None = None, flag: int = 0
    ) -> "Communicator":
        return Communicator(made_by=("shrink", exclude_ranks, config, flag))

    def get_unique_id(self) -> UniqueId:
        return UniqueId(ID[::-1])

    def grow(
        self,
        nranks: int,
        unique_id: UniqueId | None = None,
        rank: int | None = None,
        config: NCCLConfig | None = None,
    ) -> "Communicator":
        told = None if unique_id is None else unique_id.as_bytes
        return Communicator(made_by=("grow", self.made_by, nranks, told, rank, config is None))

    def revoke(self, flags: int = 0) -> None:
        if self.calls:
            raise NCCLError("InvalidArgument (4)")
        self.calls.append("revoke")

    def abort(self) -> None:
        self.calls.append("abort")

    def get_async_error(self) -> int:
        return self.state


def stand_in(code: int) -> Nccl4Py:
    core, bindings = ModuleType("nccl.core"), ModuleType("nccl.bindings.nccl")
    core.__dict__.update(
        Communicator=Communicator,
        UniqueId=UniqueId,
        NCCLConfig=NCCLConfig,
        NcclInvalid=NcclInvalid,
        get_unique_id=UniqueId,
        get_error_string=lambda state: f"error {state}",
    )
    bindings.__dict__.update(NCCLError=NCCLError, get_version=lambda: code)
    return Nccl4Py(core, bindings, "nccl", NO_DEVICE)


def test_every_call_has_its_parameters() -> None:
    library = stand_in(22807)
    assert library.abilities == NativeAbilities(shrink=True, revoke=True)
    made = library.init_rank(4, 3, library.unique_id(None))
    assert isinstance(made, Communicator)
    assert made.made_by == ("init", 4, 3, ID)
    for abort_in_flight, flag in ((False, 0), (True, 1)):
        child = library.shrink(made, (1, 2), abort_in_flight=abort_in_flight)
        assert isinstance(child, Communicator)
        assert child.made_by == ("shrink", [1, 2], None, flag)
    assert library.unique_id(made) == ID[::-1]
    member = library.grow(made, 5, None, None)
    newcomer = library.grow(None, 5, 4, ID)
    assert isinstance(member, Communicator)
    assert isinstance(newcomer, Communicator)
    assert member.made_by == ("grow", made.made_by, 5, None, None, True)
    assert newcomer.made_by == ("grow", None, 5, ID, 4, False)
    library.revoke(made)
    library.abort(made)
    assert made.calls == ["revoke", "abort"]


def test_states_and_errors() -> None:
    library, made = stand_in(23203), Communicator(made_by="test")
    assert not library.in_progress(made)
    made.state = 7
    assert library.in_progress(made)
    assert library.in_progress(Communicator())  # a child has no address yet
    made.state = 6
    with pytest.raises(PeerError, match="asynchronous error 6: error 6"):
        library.in_progress(made)
    library.revoke(made)
    with pytest.raises(PeerError, match="InvalidArgument"):
        library.revoke(made)
    with pytest.raises(PeerError, match="127 bytes"):
        library.init_rank(2, 0, ID[1:])


def test_versions() -> None:
    assert [version_of(code) for code in (22703, 22902, 23203)] == [(2, 27, 3), (2, 29, 2), (2, 32, 3)]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nccl.core", None)
    with pytest.raises(ConfigError, match="pip install nccl4py"):
        Nccl4Py.load(0)
