"""Settings for all tests, and the check that no test leaves a process behind."""

from collections.abc import Iterator

import psutil
import pytest
from hypothesis import settings

# The machine is shared: how long an example takes says nothing about the code.
settings.register_profile("elaswave", deadline=None, print_blob=True)
settings.load_profile("elaswave")

_GRACE_S = 5.0


@pytest.fixture(autouse=True)
def _no_process_left_behind() -> Iterator[None]:
    me = psutil.Process()
    before = set(me.children(recursive=True))
    yield
    started = [child for child in me.children(recursive=True) if child not in before and not _is_tracker(child)]
    _, left = psutil.wait_procs(started, timeout=_GRACE_S)
    described = [_describe(child) for child in left]
    for child in left:
        child.kill()
    assert not described, f"the test left processes behind: {described}"


def _is_tracker(process: psutil.Process) -> bool:
    # multiprocessing keeps one helper for the life of the interpreter.
    return "multiprocessing.resource_tracker" in _describe(process)


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())}"
    except psutil.Error:
        return str(process.pid)
