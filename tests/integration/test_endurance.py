"""A long run in which workers are killed all the time and start again: the same bits, and nothing grows."""

import random
from dataclasses import dataclass

import psutil
import pytest
from harness import Ground, Job, assert_same_training
from tiny_job import TinyOptions

GRID = ["--standalone", "--nproc-per-node=6", "--dp=3", "--pp=2", "--replicas=2", "--max-restarts=1000"]
JOB = TinyOptions(steps=200, global_batch=12, dropout=0.1)
LIMIT_S = 400.0
KILL_EVERY = 5
LEAST_LEFT = 3
"""No worker is killed where this few are left: they could be all that hold some state."""

LEAST_KILLS = 12
MEGABYTE = 1 << 20
GROWTH_LIMIT_MEGABYTES = {"launcher": 1, "controller": 3, "agent": 1, "zygote": 1, "worker": 3}
"""Private memory, from the second quarter of the run to the last one."""

GROWTH_LIMIT_DESCRIPTORS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Memory of its own and open files of a process."""

    private_bytes: int
    descriptors: int


def size_of(process: psutil.Process) -> Size:
    return Size(private_bytes=process.memory_full_info().uss, descriptors=process.num_fds())


def living_workers(zygote: psutil.Process) -> list[psutil.Process]:
    """Workers, oldest first."""
    found = [child for child in zygote.children() if child.status() != psutil.STATUS_ZOMBIE]
    return sorted(found, key=lambda process: (process.create_time(), process.pid))


def run_and_kill(job: Job) -> tuple[int, dict[str, list[Size]]]:
    """Kill a worker about every few steps; how many, and how large the processes that live all the time are then."""
    chosen = random.Random(7)
    job.wait_line("tiny step 0$")
    zygote = job.one("elaswave.runtime.zygote")
    survivor = living_workers(zygote)[0]
    watched = {
        "launcher": psutil.Process(job.process.pid),
        "controller": job.one("elaswave_controller"),
        "agent": job.one("elaswave_agent"),
        "zygote": zygote,
        "worker": survivor,
    }
    sizes: dict[str, list[Size]] = {name: [] for name in watched}
    kills = 0
    for step in range(KILL_EVERY, JOB.steps - KILL_EVERY, KILL_EVERY):
        job.wait_line(f"tiny step {step}$")
        for name, process in watched.items():
            sizes[name].append(size_of(process))
        workers = living_workers(zygote)
        if len(workers) > LEAST_LEFT:
            chosen.choice([worker for worker in workers if worker != survivor]).kill()
            kills += 1
    return kills, sizes


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 60)
def test_two_hundred_steps_of_deaths_and_restarts(ground: Ground) -> None:
    job = ground.start(GRID, [*JOB.flags(), "--print-steps=1"], limit_s=LIMIT_S)
    kills, sizes = run_and_kill(job)
    ended = job.wait()
    ground.check_nothing_left()
    assert_same_training(ended, JOB)
    assert kills >= LEAST_KILLS
    causes = [found.cause for found in ended.need_report().incidents]
    assert causes.count("killed") >= LEAST_KILLS // 2
    assert causes.count("join") >= LEAST_KILLS // 2
    for name, seen in sizes.items():
        quarter = len(seen) // 4
        early, late = seen[quarter : 2 * quarter], seen[-quarter:]
        grown = max(size.private_bytes for size in late) - max(size.private_bytes for size in early)
        assert grown <= GROWTH_LIMIT_MEGABYTES[name] * MEGABYTE, (name, seen)
        opened = max(size.descriptors for size in late) - max(size.descriptors for size in early)
        assert opened <= GROWTH_LIMIT_DESCRIPTORS, (name, seen)
