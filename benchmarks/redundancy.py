"""What redundancy costs without a fault: live replicas of optimizer state, and the boundary log.

    python benchmarks/redundancy.py [--quick] [--json FILE]

Paired runs of the transformer with four workers: DP 4 with one replica of each shard (the default) against none, and
PP 4 with an unlimited boundary log (the default) against one that may hold one byte, so that nothing is kept.
"""

from common import Row, Target, alternate, make_parser, options_of, paired_ratios, run
from launching import Place, make_place

LIMIT_S = 600.0


def step_seconds(place: Place, flags: list[str], size: str, steps: int) -> float:
    """Mean step time of one run."""
    warm_up = 3
    script_flags = [f"--size={size}", f"--steps={warm_up + steps}"]
    report = place.train(["--nproc-per-node=4", *flags], "train_transformer.py", script_flags, LIMIT_S)
    return report.mean_step_s(warm_up)


def main() -> None:
    """Measure both."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, metavar="N", help="runs of each kind (default: 7, with --quick 2)")
    parser.add_argument("--size", help="tiny, small or medium (default: medium; quick: small)")
    parser.add_argument("--steps", type=int, metavar="N", help="measured steps of a run (default: 12)")
    found = parser.parse_args()
    options = options_of("redundancy", found)
    size, steps = found.size or ("small" if found.quick else "medium"), found.steps or 12
    rounds = found.rounds or (2 if found.quick else 7)
    kinds = {
        "r=1": ["--dp=4", "--pp=1", "--replicas=1"],
        "r=0": ["--dp=4", "--pp=1", "--replicas=0"],
        "log": ["--dp=1", "--pp=4", "--log-cap=0"],
        "no log": ["--dp=1", "--pp=4", "--log-cap=1"],
    }
    with make_place() as place:
        systems = {name: lambda flags=flags: step_seconds(place, flags, size, steps) for name, flags in kinds.items()}
        figures = alternate(systems, rounds)
    names = {
        "r=1": "DP 4, one replica",
        "r=0": "DP 4, no replica",
        "log": "PP 4, boundary log",
        "no log": "PP 4, log of one byte",
    }
    rows = [
        Row(what=f"{names[kind]}, {size}", unit="ms", figures=[1e3 * value for value in values])
        for kind, values in figures.items()
    ]
    for kind, other, limit in (("r=1", "r=0", 1.05), ("log", "no log", 1.02)):
        ratios = paired_ratios(figures[kind], figures[other])
        target = Target(of="median", limit=limit)
        rows.append(Row(what=f"{names[kind]} / {names[other]}", unit="x", figures=ratios, target=target))
    options.finish(rows)


if __name__ == "__main__":
    run(main)
