"""A resident zygote that the runs of many tests share: none of them imports torch again."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

_START_LIMIT_S = 60.0
_LOOK_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """Where it serves, and the process."""

    socket: Path
    process: psutil.Process

    def workers(self) -> list[psutil.Process]:
        """Those of runs that are not over."""
        return [child for child in self.process.children() if child.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def resident_zygote() -> Iterator[Resident]:
    """Ends with this block, or with this process. Its socket is there at once, its import of torch takes seconds."""
    folder = Path(tempfile.mkdtemp(prefix="ewz", dir="/tmp"))
    path = folder / "zygote"
    flags = (f"--socket={path}", f"--parent-pid={os.getpid()}")
    command = (sys.executable, "-m", "elaswave.runtime.zygote", *flags)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_LIMIT_S
        while not path.exists():
            assert process.poll() is None, f"the zygote ended with {process.returncode}"
            assert time.monotonic() < deadline, f"no zygote at {path} after {_START_LIMIT_S:g} s"
            time.sleep(_LOOK_S)
        yield Resident(socket=path, process=psutil.Process(process.pid))
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)
