"""Fixtures of the tests of links and process groups."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from links_harness import End, meet
from nursery_client import Nursery


@pytest.fixture(params=["unix", "tcp"])
def addresses(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Where four workers may listen."""
    if request.param == "tcp":
        return ["tcp:127.0.0.1:0"] * 4
    return [f"unix:{tmp_path}/{number}" for number in range(4)]


@pytest.fixture
def pair(addresses: list[str]) -> Iterator[tuple[End, End]]:
    with End(0, addresses[0]) as one, End(1, addresses[1]) as other:
        meet(one, other)
        yield one, other


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with TemporaryDirectory(prefix="pg-") as temporary:  # short: it is part of the addresses of sockets
        found = Nursery(temporary)
        yield found
        found.close()
