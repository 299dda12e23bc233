"""A process that has imported torch and forks the ranks of a job, so that a test need not wait for imports.

Each line it reads is {"job": name, "arguments": {}, "size": ranks, "folder": where, "limit_s": seconds, "memory": "1"}
(or "0": ranks use links only); the answer are the ranks' exit codes, negative for signals. What a rank returns is in
FOLDER/RANK.json, what it writes in FOLDER/RANK.txt. The nursery never makes a store or a thread itself: neither
survives a fork.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

# What DDP, FSDP2 and checkpoints import on first use, once instead of in every rank.
import torch._dynamo
import torch.distributed.checkpoint._fsspec_filesystem

from elaswave.comm.fabric import SHARED_MEMORY_VARIABLE
from elaswave.lifeline import end_with_parent
from tests.comm import (  # noqa: F401 (they add to JOBS)
    process_group_endings,
    process_group_jobs,
    process_group_joins,
    process_group_native,
    process_group_steps,
    process_group_subgroups,
    process_group_tls,
    process_group_training,
)
from tests.comm.process_group_place import JOBS, Place


def run(name: str, place: Place) -> None:
    """One rank, in a process of its own."""
    output = os.open(place.folder / f"{place.rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    try:
        found = JOBS[name](place)
        (place.folder / f"{place.rank}.json").write_text(json.dumps(found))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def start(name: str, place: Place) -> int:
    me = os.getpid()
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        end_with_parent(me)
        run(name, place)
    return pid


def finish(pids: list[int], limit_s: float) -> list[int]:
    """Exit codes; who has not ended in time is killed."""
    deadline = time.monotonic() + limit_s
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        if time.monotonic() > deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
        for pid in set(pids) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if len(codes) < len(pids):
            signal.sigtimedwait({signal.SIGCHLD}, max(0.01, deadline - time.monotonic()))
    return [codes[pid] for pid in pids]


def main() -> None:
    end_with_parent(int(sys.argv[1]))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    print("ready", flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        folder, size = Path(wanted["folder"]), int(wanted["size"])
        os.environ[SHARED_MEMORY_VARIABLE] = wanted["memory"]
        places = [Place(rank=rank, size=size, folder=folder, arguments=wanted["arguments"]) for rank in range(size)]
        pids = [start(wanted["job"], place) for place in places]
        print(json.dumps(finish(pids, wanted["limit_s"])), flush=True)


if __name__ == "__main__":
    main()
