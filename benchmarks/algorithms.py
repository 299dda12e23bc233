"""Algorithms of an all-reduce over links beside each other: what elaswave/comm/group.py chooses from.

    python benchmarks/algorithms.py [--quick] [--json FILE] [--ranks 8] [--sizes 64KB,1MB] [--rounds N] [--scheme tcp]

One gang of processes; every round runs each algorithm, in an order that changes. Beside the time from the first rank
that begins to the last that ends stands the time that all ranks together compute, divided by the number of cores: load
from outside disturbs it less. Results are checked.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from common import Row, alternate, make_parser, options_of, run, say
from communicators import repeats_of, size_name, size_of
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent / "jobs"))

from ranks import Gang, soon, span, wait_until

from elaswave.comm.collectives.commands import Collective
from elaswave.comm.collectives.composed import acknowledged
from elaswave.comm.collectives.direct import direct_all_gather, direct_reduce_scatter
from elaswave.comm.collectives.grid import grid_all_reduce, halved_all_reduce
from elaswave.comm.collectives.reduction import Combine, add, even_segments, split
from elaswave.comm.collectives.tree import tree_all_reduce
from elaswave.comm.endpoint import Endpoint
from elaswave.comm.group import KEEP_LIMIT_BYTES
from elaswave.comm.inbox import PeerClosed
from elaswave.comm.operation import Operation
from elaswave.core.ids import WorkerId
from elaswave.errors import LinkClosed

LIMIT_S = 100.0


def direct_all_reduce(rank: int, size: int, whole: Tensor, combine: Combine) -> Collective:
    """Everybody with everybody."""
    segments = split(whole, even_segments(whole.numel(), size))
    yield from direct_reduce_scatter(rank, segments, combine)
    yield from direct_all_gather(rank, segments)


ALGORITHMS = {
    "tree": tree_all_reduce,
    "halves": halved_all_reduce,
    "grid": grid_all_reduce,
    "direct": direct_all_reduce,
}


class AlgorithmRank:
    """Its methods are called by the benchmark, on all ranks at once."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank = rank
        self._size = size
        self._endpoint = Endpoint(WorkerId(rank), b"benchmark", on_lost=_lost, on_notice=lambda peer, content: None)

    def listen(self, scheme: str, folder: Path) -> str:
        """The address for the others."""
        return self._endpoint.open(f"unix:{folder}/{self._rank}" if scheme == "unix" else "tcp:127.0.0.1:0")

    def connect(self, addresses: dict[int, str]) -> None:
        """Make the communicator."""
        self._endpoint.connect({WorkerId(rank): address for rank, address in addresses.items()})
        self._communicator = self._endpoint.communicator("all", [WorkerId(rank) for rank in range(self._size)])

    def time(self, algorithm: str, nbytes: int, repeats: int, start_at: float) -> tuple[float, float, float]:
        """When this rank began and ended, and the seconds that it computed. Raises ArithmeticError if it is wrong."""
        whole = torch.ones(nbytes // 4)
        wait_until(start_at)
        computed, begun = time.process_time(), time.monotonic()
        for _ in range(repeats):
            whole.fill_(1)
            self._all_reduce(algorithm, whole)
        ended, computed = time.monotonic(), time.process_time() - computed
        if not bool((whole == self._size).all()):
            raise ArithmeticError(f"{algorithm}: an all-reduce of {nbytes} bytes has a wrong result")
        return begun, ended, computed

    def _all_reduce(self, algorithm: str, whole: Tensor) -> None:
        collective = ALGORITHMS[algorithm](self._rank, self._size, whole, add)
        keep = whole.nbytes <= KEEP_LIMIT_BYTES
        if not keep:
            collective = acknowledged(self._rank, self._size, collective)
        deadline = time.monotonic() + LIMIT_S
        operation = Operation(algorithm, collective, deadline, whole if keep else None, keep=keep)
        self._endpoint.start(self._communicator, operation)
        self._endpoint.wait(operation)


def _lost(closed: PeerClosed) -> None:
    raise LinkClosed(f"worker {closed.peer} is gone: {closed.reason}")


def measure(gang: Gang[AlgorithmRank], nbytes: int, rounds: int) -> list[Row]:
    """The rows of one size."""
    name = f"{gang.size} ranks, {size_name(nbytes)}"
    say(name)
    repeats = repeats_of(nbytes, gang.size)
    computed: dict[str, list[float]] = {algorithm: [] for algorithm in ALGORITHMS}

    def take(algorithm: str, repeats: int) -> float:
        taken = gang.call(AlgorithmRank.time, algorithm, nbytes, repeats, soon()).values()
        computed[algorithm].append(1e3 * sum(own for _, _, own in taken) / (os.cpu_count() or 1) / repeats)
        return 1e3 * span((begun, ended) for begun, ended, _ in taken) / repeats

    for algorithm in ALGORITHMS:
        take(algorithm, 1)  # opens connections, warms up
        computed[algorithm].clear()
    taken = alternate({algorithm: partial(take, algorithm, repeats) for algorithm in ALGORITHMS}, rounds)
    rows = [Row(what=f"{name}: {algorithm}", unit="ms", figures=figures) for algorithm, figures in taken.items()]
    rows += [Row(what=f"{name}: {algorithm}, computed", unit="ms", figures=own) for algorithm, own in computed.items()]
    return rows


def main() -> None:
    """Measure all sizes in one gang."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=8, metavar="N", help="number of ranks (default: 8)")
    parser.add_argument("--sizes", metavar="S,S", help="of tensors (default: 64KB,256KB,1MB,4MB,16MB; quick: 1MB)")
    parser.add_argument("--rounds", type=int, metavar="N", help="of each algorithm (default: 5; quick: 2)")
    parser.add_argument("--scheme", choices=("tcp", "unix"), default="tcp", help="of links (default: tcp)")
    found = parser.parse_args()
    sizes = [
        size_of(text) for text in (found.sizes or ("1MB" if found.quick else "64KB,256KB,1MB,4MB,16MB")).split(",")
    ]
    rows: list[Row] = []
    with Gang(found.ranks, lambda rank: AlgorithmRank(rank, found.ranks)) as gang:
        gang.call(AlgorithmRank.connect, gang.call(AlgorithmRank.listen, found.scheme, gang.folder))
        for nbytes in sizes:
            rows += measure(gang, nbytes, found.rounds or (2 if found.quick else 5))
    options_of("algorithms", found).finish(rows)


if __name__ == "__main__":
    run(main)
