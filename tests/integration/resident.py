"""A resident zygote that the runs of many tests share: none of them imports torch again."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil


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
    """Ends with this block, or with this process."""
    folder = Path(tempfile.mkdtemp(prefix="ewz", dir="/tmp"))
    path = folder / "zygote"
    flags = (f"--socket={path}", f"--parent-pid={os.getpid()}", "--announce")
    command = (sys.executable, "-m", "elaswave.runtime.zygote", *flags)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"elaswave zygote: serving at {path}\n"
            yield Resident(socket=path, process=psutil.Process(process.pid))
        finally:
            process.kill()
    shutil.rmtree(folder)
