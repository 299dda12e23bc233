"""Fault-free step time beside torch's own parallelism, and beside the same compute without communication.

    python benchmarks/step_time.py [--quick] [--json FILE]

The same transformer in plain torch, the same micro-batches, AdamW, four processes with one thread each:
  DP 4 against DistributedDataParallel on gloo (no_sync for all but the last micro-batch),
  PP 4 against torch.distributed.pipelining's Schedule1F1B on gloo,
each with float32 and exact64 accumulation, and beside them four independent processes that do the same compute without
any communication: the floor. Every round runs each system once, in turn; a run's figure is its mean step time after
some steps to warm up, start-up left out. Ratios are formed within a round.

The floor of DP includes AdamW on all parameters in every process, as DistributedDataParallel has it; ElasWave updates
each shard on its owner and its replica only.
"""

import json
import os
import sys
from argparse import Namespace
from dataclasses import dataclass

from common import Options, Row, Target, alternate, make_parser, options_of, paired_ratios, run
from launching import JOBS, Place, make_place

sys.path.append(str(JOBS))

LIMIT_S = 600.0
ACCUMULATIONS = ("float32", "exact64")
RATIO_LIMITS = {"float32": 1.0, "exact64": 1.15}
FLOOR_GOAL = 1.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One layout, and the system of torch's that does the same."""

    name: str
    flags: tuple[str, ...]
    system: str
    called: str


COMPARISONS = (
    Comparison(name="DP 4", flags=("--dp=4", "--pp=1"), system="ddp", called="torch DDP"),
    Comparison(name="PP 4", flags=("--dp=1", "--pp=4"), system="pipeline", called="torch 1F1B"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """Steps of one run."""

    warm_up: int
    steps: int


def run_elaswave(place: Place, comparison: Comparison, size: str, accumulation: str, length: Length) -> float:
    """Seconds per step."""
    flags = ["--nproc-per-node=4", *comparison.flags]
    script_flags = [f"--size={size}", f"--steps={length.warm_up + length.steps}", f"--accumulation={accumulation}"]
    return place.train(flags, "train_transformer.py", script_flags, LIMIT_S).mean_step_s(length.warm_up)


def run_gang(place: Place, system: str, size: str, length: Length, found: Namespace) -> float:
    """Seconds per step of the slowest process."""
    folder = place.folder(system)
    out = folder / "figures.json"
    malloc = "kept" if system.endswith("floor") or found.tune_rivals else "default"
    command = [
        *(sys.executable, str(JOBS / "gang.py"), f"--system={system}", f"--size={size}", f"--out={out}"),
        *(f"--warm-up={length.warm_up}", f"--steps={length.steps}", f"--parent={os.getpid()}"),
        *(f"--optimizer={found.rival_optimizer}", f"--malloc={malloc}"),
    ]
    place.start(command, folder / "output.txt").succeed(LIMIT_S)
    return float(json.loads(out.read_text())["step_seconds"])


def compare(place: Place, comparison: Comparison, size: str, length: Length, found: Namespace) -> list[Row]:
    """The rows of one layout and size."""
    floor = f"{comparison.system}-floor"
    systems = {
        comparison.system: lambda: run_gang(place, comparison.system, size, length, found),
        floor: lambda: run_gang(place, floor, size, length, found),
        "float32": lambda: run_elaswave(place, comparison, size, "float32", length),
        "exact64": lambda: run_elaswave(place, comparison, size, "exact64", length),
    }
    figures = alternate(systems, found.rounds)
    name = f"{comparison.name}, {size}"
    called = {comparison.system: comparison.called, floor: "no communication"}
    rows = [
        Row(what=f"{name}: {called.get(system, system)}", unit="ms", figures=[1e3 * value for value in values])
        for system, values in figures.items()
    ]
    for accumulation in ACCUMULATIONS:
        ours = figures[accumulation]
        rows.append(
            Row(
                what=f"{name}: {accumulation} / {comparison.called}",
                unit="x",
                figures=paired_ratios(ours, figures[comparison.system]),
                target=Target(of="median", limit=RATIO_LIMITS[accumulation]),
            )
        )
        rows.append(
            Row(
                what=f"{name}: {accumulation} / no communication",
                unit="x",
                figures=paired_ratios(ours, figures[floor]),
                target=Target(of="median", limit=FLOOR_GOAL, goal=True),
            )
        )
    return rows


def read_options() -> tuple[Options, Namespace]:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, metavar="N", help="runs of each system (default: 5, with --quick 1)")
    parser.add_argument(
        "--sizes", metavar="S,S", help="of tiny, small and medium (default: small,medium; quick: small)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="measured steps of a run (default: by size; quick: 8)")
    parser.add_argument(
        "--rival-optimizer", choices=("fused", "default"), default="fused", help="torch's AdamW (default: fused)"
    )
    parser.add_argument(
        "--tune-rivals", action="store_true", help="torch's processes keep freed memory as ours do, by mallopt"
    )
    found = parser.parse_args()
    found.rounds = found.rounds or (1 if found.quick else 5)
    found.sizes = (found.sizes or ("small" if found.quick else "small,medium")).split(",")
    return options_of("step_time", found), found


def main() -> None:
    """Measure all layouts and sizes."""
    options, found = read_options()
    from transformer import SIZES  # noqa: PLC0415 - imports torch, which --help does not need

    rows: list[Row] = []
    with make_place() as place:
        for size in found.sizes:
            steps = found.steps or (8 if found.quick else SIZES[size].steps)
            length = Length(warm_up=2 if found.quick else SIZES[size].warm_up, steps=steps)
            for comparison in COMPARISONS:
                rows += compare(place, comparison, size, length, found)
    options.finish(rows)


if __name__ == "__main__":
    run(main)
