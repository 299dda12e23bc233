"""What tests know of the process that forks ranks for them."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
START_S = 60.0
JOB_S = 40.0
SHOWN = 1500
MEMORY, LINKS = "1", "0"
"""What ELASWAVE_SHARED_MEMORY is."""

both = pytest.mark.parametrize("memory", [MEMORY, LINKS], ids=["memory", "links"])


class Nursery:
    """A process that forks ranks; see process_group_nursery.py."""

    def __init__(self, temporary: str) -> None:
        self.temporary = Path(temporary)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.comm.process_group_nursery", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": temporary},
        )
        assert self._line(START_S) == "ready"

    def _line(self, limit_s: float) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], limit_s)
        assert ready, "the nursery does not answer"
        return self.process.stdout.readline().strip()

    def run(
        self,
        job: str,
        size: int,
        folder: Path,
        *,
        killed: tuple[int, ...] = (),
        memory: str = MEMORY,
        **arguments: object,
    ) -> dict[int, object]:
        """What the ranks that are not to be killed have returned."""
        assert self.process.stdin is not None
        wanted = {"job": job, "arguments": arguments, "size": size, "folder": str(folder), "limit_s": JOB_S}
        wanted["memory"] = memory
        self.process.stdin.write(json.dumps(wanted) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self._line(JOB_S + 10.0))
        expected = [-signal.SIGKILL if rank in killed else 0 for rank in range(size)]
        said = "\n".join(f"rank {rank}: {(folder / f'{rank}.txt').read_text()[-SHOWN:]}" for rank in range(size))
        assert codes == expected, said
        return {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in range(size) if rank not in killed}

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10.0)
