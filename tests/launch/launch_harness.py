"""Runs of elaswave-launch as a real process, with its own run folder."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

LIMIT_S = 60.0
COMMAND = (sys.executable, "-m", "elaswave_launch.cli")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a test's jobs live. `runtime` is short, as socket paths are limited, and is their XDG_RUNTIME_DIR."""

    runtime: Path
    work: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "ELASWAVE_"))}
        return {**kept, "XDG_RUNTIME_DIR": str(self.runtime)}

    @property
    def run_folders(self) -> list[Path]:
        base = self.runtime / f"elaswave-{os.getuid()}"
        return sorted(base.iterdir()) if base.exists() else []

    def script(self, text: str, name: str = "script.py") -> str:
        """A script in the working folder; returns its path."""
        path = self.work / name
        path.write_text(text)
        return str(path)


@contextmanager
def make_place(work: Path) -> Iterator[Place]:
    runtime = Path(tempfile.mkdtemp(prefix="ew", dir="/tmp"))
    try:
        yield Place(runtime=runtime, work=work)
    finally:
        shutil.rmtree(runtime)


def popen(place: Place, *arguments: str, extra: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """A launcher that runs; the test waits for it."""
    return subprocess.Popen(
        (*COMMAND, *arguments),
        cwd=place.work,
        env={**place.environment, **(extra or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(place: Place, *arguments: str, extra: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A launcher that has ended."""
    process = popen(place, *arguments, extra=extra)
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def family(pid: int) -> list[psutil.Process]:
    """The process and all its descendants."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def all_gone(processes: list[psutil.Process], limit_s: float) -> bool:
    """Whether all have ended within the limit; they need not be our children."""
    _, alive = psutil.wait_procs(processes, timeout=limit_s)
    return all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in alive)
