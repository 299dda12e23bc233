"""A process that holds torch's distributed suite and runs its cases, each in processes of its own; one setting each.

Started by distributed_cases.py with the setting in its environment: the suite reads BACKEND, WORLD_SIZE and INIT_METHOD
while it is imported. First answers with all cases and why the suite skips them, then with the outcome of each request.
Requests and answers are JSON, one a line.
"""

import importlib
import json
import multiprocessing
import os
import select
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.testing._internal.common_distributed as common
from distributed_processes import adopt_orphans, end_with_parent, sweep

Function = Callable[..., object]
Decorator = Callable[[Function], Function]

BACKEND = os.environ["CASES_BACKEND"]

# Their bodies make the model for the CPU if the name is mpi or gloo, for a GPU if it is nccl, and else none at all.
# Their processes are told gloo's name once the default group is there, which all that they do goes through.
NAME_CHOOSES_THE_DEVICE = "test_accumulate_gradients_no_sync"

# The suite ends its own processes a while before the limit that holds for the case: it tells then where they hung.
GRACE_S = 15.0
LOG_BYTES = 200_000  # the stacks of eight processes are many lines
SKIP_TEXTS = {skip.exit_code: skip.message for skip in common.TEST_SKIPS.values()}


def settled(decorator: Decorator) -> Decorator:
    """`decorator`, which skips a case by an exit of its processes, as one that skips it before they are started."""

    def decorate(case: Function) -> Function:
        try:
            decorator(lambda *_: None)(None)
        except SystemExit as end:
            return unittest.skip(SKIP_TEXTS[int(end.code or 0)])(case)
        return decorator(case)

    return decorate


# Else each of the cases for GPUs would start its processes and connect them, only to end them.
vars(common).update(
    skip_if_no_gpu=settled(common.skip_if_no_gpu),
    skip_if_small_worldsize=settled(common.skip_if_small_worldsize),
    skip_if_odd_worldsize=settled(common.skip_if_odd_worldsize),
    skip_if_lt_x_gpu=lambda count, original=common.skip_if_lt_x_gpu: settled(original(count)),
)

# After the lines above: the suite takes its decorators by name.
suite: Any = importlib.import_module("torch.testing._internal.distributed.distributed_test")

# The suite knows backends by name and skips what it never tried with one, such as coalesced collectives or get_future
# with all but gloo. So its decorators were told the name of a backend that it knows (BACKEND in the environment), and
# all that runs is told the true one. That is more than to enter the name in the sets of backend_feature, which only
# some of the decorators ask. Its lists of backends with events in a profile are left alone: that is a feature more,
# which the cases on profiles ask of the listed ones alone; elastic's are run with a profiler, but not asked for events.
suite.BACKEND = BACKEND
if BACKEND == "elastic":
    # In every process: a spawned one imports this module again.
    importlib.import_module("elaswave.comm.process_group")


class DistributedCases(suite.TestDistBackend, suite.DistributedTest._DistTestBase):  # type: ignore[misc]
    """All cases of the suite, in processes that end with the one that started them."""

    def setUp(self) -> None:
        super().setUp()
        context: Any = multiprocessing.get_context(os.environ["CASES_START"])
        self._start_processes(context.Process)

    @classmethod
    def _run(cls, rank: int, test_name: str, file_name: str, pipe: Connection, **options: object) -> None:
        end_with_parent()
        suite.INIT_METHOD = os.environ["INIT_METHOD"]  # of this case: a spawned process would have found it
        super()._run(rank, test_name, file_name, pipe, **options)

    def run_test(self, test_name: str, parent_pipe: Connection) -> None:
        if test_name.startswith(NAME_CHOOSES_THE_DEVICE):
            suite.BACKEND = "gloo"
        super().run_test(test_name, parent_pipe)


def main() -> None:
    adopt_orphans()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the suite prints is no answer
    print(json.dumps(catalogue()), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        outcome = run_case(request["case"], Path(request["folder"]), float(request["limit_s"]))
        print(json.dumps(outcome), file=answers, flush=True)


def catalogue() -> dict[str, str | None]:
    """Why the suite skips each case; None for one that it runs."""
    names = unittest.TestLoader().getTestCaseNames(DistributedCases)
    cases = {name: getattr(DistributedCases, name) for name in names}
    return {
        name: str(case.__unittest_skip_why__) if getattr(case, "__unittest_skip__", False) else None
        for name, case in cases.items()
    }


def run_case(name: str, folder: Path, limit_s: float) -> dict[str, object]:
    """The outcome of one case; none of its processes is left after it."""
    started_at = time.monotonic()
    # A copy of this process, which did no more than import and has one thread: an import costs seconds for each case.
    pid = os.fork()
    if not pid:
        run_in_child(name, folder)
    watched = os.pidfd_open(pid)
    ended, _, _ = select.select([watched], [], [], limit_s + GRACE_S)
    os.close(watched)
    sweep()
    seconds = time.monotonic() - started_at
    path = folder / "result.json"
    if ended and path.exists():
        outcome = json.loads(path.read_text())
    else:
        error = "the process of the case died" if ended else f"killed after {seconds:.0f} s"
        outcome = {"skipped": "", "error": f"RuntimeError: {error}"}
    return {**outcome, "seconds": round(seconds, 2), "log": tail(folder / "log")}


def run_in_child(name: str, folder: Path) -> None:
    """Run the case in this process, keep the outcome in `folder` and end."""
    try:
        end_with_parent()
        os.setsid()  # a Ctrl-C is for the terminal's process alone
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
        result = unittest.TestResult()
        unittest.TestSuite([DistributedCases(name)]).run(result)
        sys.stdout.flush()
        outcome = {
            "skipped": "".join(reason for _, reason in result.skipped),
            "error": "\n".join(text for _, text in (*result.errors, *result.failures)),
        }
        (folder / "partial").write_text(json.dumps(outcome))
        (folder / "partial").rename(folder / "result.json")
    finally:
        os._exit(0)


def tail(path: Path) -> str:
    return path.read_bytes()[-LOG_BYTES:].decode(errors="replace") if path.exists() else ""


if __name__ == "__main__":
    end_with_parent()
    main()
