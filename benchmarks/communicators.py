"""Communicators beside torch's gloo: all-reduce, reduce-scatter and all-gather, and the edit after a SIGKILL.

    python benchmarks/communicators.py [--quick] [--json FILE] [--ranks 8,16,32] [--sizes 1KB,16MB] [--rounds N]

Collectives: one gang of processes per number of ranks holds a group of ours for each way of reaching each other and a
gloo group (of TCP over loopback); every round runs each of them once, in an order that changes. A size is that of the
longer tensor of float32: the input of a reduce-scatter, the output of an all-gather. A time is that from the first rank
that begins to the last that ends, by the number of collectives in between. Results are checked.

Edit: a gang of its own per trial. Ranks are a grid; each is in the world, its row (DP) and its column (PP), and has an
all-reduce of 1 MB over Unix sockets (--memory: in shared memory) under way in all three, again and again, till a random
rank is killed at a random moment. "decided" is when the first survivor knows and the store has it, after the kernel has
taken the process apart. From there to the last survivor's end of a 1 KB all-reduce in every edited group all counts as
the edit: news, the way out of what was under way, agreement, new links, and what other groups do meanwhile.
Then the same all-reduces undisturbed (median of several), and gloo: a new ProcessGroupGloo
for each of the three groups of the dead rank and an all-reduce in each (partial), all groups destroyed and made again,
and an all-reduce in each (full). Gloo's time starts when all survivors are ready; its store, like ours, is a TCPStore
in a process of its own to which all have connected before: 32 clients that connect can take 5 s, which is not gloo's.
Gloo's groups exist from the beginning, so survivors have its broken connections to handle during our edit.

Ours is called as a Group of an Endpoint (collectives) or a Fabric (edit), without torch.distributed above it; gloo's
collectives are those of torch.distributed. The time of that layer is some tens of microseconds a call.
"""

import random
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import BenchmarkFailed, Options, Row, Target, alternate, make_parser, options_of, paired_ratios, run, say

sys.path.append(str(Path(__file__).resolve().parent / "jobs"))

from collective_rank import GLOO, WAYS, CollectiveRank
from edit_rank import EditRank, Grid
from ranks import Gang, soon, span

from elaswave.comm.arena import ARENA_BYTES

COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather")
UNITS = {"MB": 1 << 20, "KB": 1 << 10}
SMALL_LIMIT_BYTES = 4 << 20
UNDISTURBED = 5
EDIT_LIMIT, PARTIAL_LIMIT, FULL_LIMIT = 5.0, 10.0, 80.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Least median of gloo's time / ours, for sizes up to SMALL_LIMIT_BYTES and for larger ones."""

    small: float
    large: float


WANTED = {"TCP": Wanted(small=3.0, large=0.95), "shared memory": Wanted(small=5.0, large=1.5)}
"""By the names of the ways in jobs/collective_rank.py; others have no target."""


# ------------------------------------------------------------------ collectives


def repeats_of(nbytes: int, ranks: int) -> int:
    """Collectives of one measurement: what is small is repeated."""
    if nbytes <= 64 << 10:
        return max(5, 400 // ranks)
    return 5 if nbytes <= SMALL_LIMIT_BYTES else 1


def time_collective(gang: Gang[CollectiveRank], system: str, collective: str, nbytes: int, repeats: int) -> float:
    """Milliseconds of one."""

    times = gang.call(CollectiveRank.time, system, collective, nbytes, repeats, soon())
    return 1e3 * span(times.values()) / repeats


def compare_collectives(gang: Gang[CollectiveRank], collective: str, nbytes: int, rounds: int) -> list[Row]:
    """The rows of one collective, size and number of ranks."""
    name = f"{gang.size} ranks, {collective} of {size_name(nbytes)}"
    repeats = repeats_of(nbytes, gang.size)
    say(name)
    for system in (GLOO, *WAYS):
        time_collective(gang, system, collective, nbytes, 1)  # opens connections, warms up
    systems = {system: partial(time_collective, gang, system, collective, nbytes, repeats) for system in (GLOO, *WAYS)}
    figures = alternate(systems, rounds)
    rows = [Row(what=f"{name}: {system}", unit="ms", figures=taken) for system, taken in figures.items()]
    rows += [
        Row(
            what=f"{name}: {GLOO} / {system}",
            unit="x",
            figures=paired_ratios(figures[GLOO], figures[system]),
            target=target_of(system, collective, nbytes),
        )
        for system in WAYS
    ]
    return rows


def target_of(system: str, collective: str, nbytes: int) -> Target | None:
    """What a ratio has to reach: for all-reduces, and as a goal for the others."""
    wanted = WANTED.get(system)
    if wanted is None:
        return None
    limit = wanted.small if nbytes <= SMALL_LIMIT_BYTES else wanted.large
    return Target(of="median", limit=limit, least=True, goal=collective != "all-reduce")


def measure_collectives(ranks: int, sizes: Sequence[int], rounds: int) -> list[Row]:
    """Start a gang and compare all systems in it."""
    rows: list[Row] = []
    with Gang(ranks, lambda rank: CollectiveRank(rank, ranks)) as gang:
        addresses = gang.call(CollectiveRank.listen, gang.folder)
        gang.call(CollectiveRank.connect, addresses, gang.store_port)
        for nbytes in sizes:
            for collective in COLLECTIVES:
                rows += compare_collectives(gang, collective, nbytes, rounds)
    return rows


# ------------------------------------------------------------------ edit


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Milliseconds of one loss. edit, after_out: until the last survivor has its first all-reduces of the new epoch."""

    died: float
    decided: float
    out: float
    edit: float
    after_out: float
    undisturbed: float
    connected: float
    links: int
    partial: float
    full: float


def run_trial(gang: Gang[EditRank], chance: random.Random) -> Trial:
    """Kill a random rank of a busy gang."""

    connected = gang.call(EditRank.connect, gang.store_port, soon())
    gang.call(EditRank.set_up)
    dead = chance.randrange(gang.size)
    collect = gang.start(EditRank.train)
    time.sleep(chance.uniform(0.3, 0.6))
    killed_at, dead_at = gang.kill(dead)
    survivors = collect().values()
    known = [survivor.decided_at for survivor in survivors if survivor.decided_at is not None]
    if not known:
        raise BenchmarkFailed(f"rank {dead} of {gang.size} was killed, and nobody told the store")
    decided_at, out_at = min(known), max(survivor.out_at for survivor in survivors)
    ended_at = max(survivor.ended_at for survivor in survivors)
    undisturbed = [span(gang.call(EditRank.undisturbed, soon()).values()) for _ in range(UNDISTURBED)]
    return Trial(
        died=1e3 * (dead_at - killed_at),
        decided=1e3 * (decided_at - killed_at),
        out=1e3 * (out_at - killed_at),
        edit=1e3 * (ended_at - decided_at),
        after_out=1e3 * (ended_at - out_at),
        undisturbed=1e3 * statistics.median(undisturbed),
        connected=1e3 * span(connected.values()),
        links=sum(survivor.dials for survivor in survivors),
        partial=1e3 * span(gang.call(EditRank.rebuild_partly, dead, soon()).values()),
        full=1e3 * span(gang.call(EditRank.rebuild_fully, dead, soon()).values()),
    )


def measure_edits(ranks: int, count: int, chance: random.Random, arena_bytes: int) -> list[Row]:
    """Trials of one number of ranks, each in a gang of its own."""
    columns = 2 if ranks < 16 else 4
    grid = Grid(rows=ranks // columns, columns=columns)
    trials: list[Trial] = []
    for _ in range(count):
        with Gang(ranks, lambda rank: EditRank(rank, grid, arena_bytes)) as gang:
            trials.append(run_trial(gang, chance))
        say(f"{ranks} ranks: {trials[-1]}")
    return edit_rows(f"{ranks} ranks ({grid.rows}x{grid.columns})", trials)


def edit_rows(name: str, trials: Sequence[Trial]) -> list[Row]:
    """What the trials have given."""
    edit = [trial.edit for trial in trials]
    times = {
        "kill -> the process has ended": [trial.died for trial in trials],
        "kill -> decided": [trial.decided for trial in trials],
        "kill -> all out of their operations": [trial.out for trial in trials],
        "edit, decided -> all have reduced": edit,
        "edit, all out -> all have reduced": [trial.after_out for trial in trials],
        "the same all-reduces undisturbed": [trial.undisturbed for trial in trials],
        "gloo partial rebuild": [trial.partial for trial in trials],
        "gloo full rebuild": [trial.full for trial in trials],
        "ranks connect to the store": [trial.connected for trial in trials],
    }
    rows = [Row(what=f"{name}: {what}", unit="ms", figures=figures) for what, figures in times.items()]
    rows.append(
        Row(what=f"{name}: connections dialled, two a link", unit="dials", figures=[trial.links for trial in trials])
    )
    rows.append(
        Row(
            what=f"{name}: edit / undisturbed",
            unit="x",
            figures=paired_ratios(edit, [trial.undisturbed for trial in trials]),
            target=Target(of="median", limit=EDIT_LIMIT),
        )
    )
    rebuilds = {
        "partial": ([trial.partial for trial in trials], Target(of="median", limit=PARTIAL_LIMIT, least=True)),
        "full": ([trial.full for trial in trials], Target(of="median", limit=FULL_LIMIT, least=True, goal=True)),
    }
    for kind, (rebuild, target) in rebuilds.items():
        rows.append(
            Row(what=f"{name}: gloo {kind} / edit", unit="x", figures=paired_ratios(rebuild, edit), target=target)
        )
        after_out = paired_ratios(rebuild, [trial.after_out for trial in trials])
        rows.append(Row(what=f"{name}: gloo {kind} / edit from all out", unit="x", figures=after_out))
    return rows


# ------------------------------------------------------------------ command line


def size_name(nbytes: int) -> str:
    """64 MB and the like."""
    for unit, scale in UNITS.items():
        if nbytes >= scale and nbytes % scale == 0:
            return f"{nbytes // scale} {unit}"
    return f"{nbytes} B"


def size_of(text: str) -> int:
    """Bytes of 64MB and the like. Raises ValueError for anything else."""
    number, unit = text[:-2], text[-2:].upper()
    if unit not in UNITS or not number.isdecimal() or not int(number):
        raise ValueError(f"{text!r} is no size: 1KB, 64MB and the like are")
    return int(number) * UNITS[unit]


def read_options() -> tuple[Options, Namespace]:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", metavar="N,N", help="numbers of ranks, multiples of 4 (default: 8,16,32; quick: 8)")
    parser.add_argument("--sizes", metavar="S,S", help="of tensors (default: 1KB,1MB,16MB,64MB; quick: 1KB,1MB)")
    parser.add_argument("--rounds", type=int, metavar="N", help="of each collective (default: 5; quick: 2)")
    parser.add_argument("--trials", type=int, metavar="N", help="losses per number of ranks (default: 7; quick: 2)")
    parser.add_argument("--only", choices=("collectives", "edit"), help="one of the two parts")
    parser.add_argument("--memory", action="store_true", help="groups that are edited share memory, as torch's do here")
    found = parser.parse_args()
    found.rounds = found.rounds or (2 if found.quick else 5)
    found.trials = found.trials or (2 if found.quick else 7)
    try:
        found.ranks = [int(text) for text in (found.ranks or ("8" if found.quick else "8,16,32")).split(",")]
        found.sizes = [
            size_of(text) for text in (found.sizes or ("1KB,1MB" if found.quick else "1KB,1MB,16MB,64MB")).split(",")
        ]
    except ValueError as error:
        parser.error(str(error))
    if any(ranks < 4 or ranks % 4 for ranks in found.ranks):
        parser.error(f"--ranks {found.ranks}: the grid of the edit needs multiples of 4")
    return options_of("communicators", found), found


def main() -> None:
    """Measure both parts for all numbers of ranks."""
    options, found = read_options()
    chance = random.Random(found.seed)
    rows: list[Row] = []
    for ranks in found.ranks:
        if found.only != "edit":
            rows += measure_collectives(ranks, found.sizes, found.rounds)
        if found.only != "collectives":
            rows += measure_edits(ranks, found.trials, chance, ARENA_BYTES if found.memory else 0)
    options.finish(rows)


if __name__ == "__main__":
    run(main)
