"""Runs all benchmarks, one after another.

    python benchmarks/run.py [--quick] [--only NAME,NAME] [--json FILE]
    make bench BENCH_ARGS=--quick

Each prints its table; at the end come the targets that were missed. The exit code is 1 where a benchmark could not be
run, whatever its figures.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import make_parser

from elaswave.lifeline import end_with_parent

HERE = Path(__file__).resolve().parent
NAMES = (
    "links",
    "step_time",
    "redundancy",
    "startup",
    "recovery",
    "detection",
    "rivals",
    "communicators",
    "algorithms",
)
WITHOUT_SEED = ("links",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """One benchmark that has run. values: the content of its JSON file; None where it wrote none."""

    name: str
    exit_code: int
    values: object

    @property
    def missed(self) -> list[str]:
        """What missed its target."""
        rows = self.values.get("rows", []) if isinstance(self.values, dict) else []
        return [f"{row['what']}: {row['median']:.4g} {row['unit']}, target {row['target']}"
                for row in rows if row["met"] is False]  # fmt: skip


def run_one(name: str, flags: list[str]) -> Ended:
    """Run one benchmark; its table goes to our output."""
    me = os.getpid()
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        command = [sys.executable, str(HERE / f"{name}.py"), f"--json={figures}", *flags]
        print(f"== {name} {' '.join(flags)}", flush=True)
        done = subprocess.run(command, check=False, preexec_fn=lambda: end_with_parent(me))
        values = json.loads(figures.read_text()) if figures.exists() else None
    print(flush=True)
    return Ended(name=name, exit_code=done.returncode, values=values)


def main() -> int:
    """Run them all."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", metavar="NAME,NAME", help=f"of {', '.join(NAMES)}")
    found = parser.parse_args()
    names = found.only.split(",") if found.only else list(NAMES)
    unknown = set(names) - set(NAMES)
    if unknown:
        parser.error(f"--only {found.only}: there is no {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    results: list[Ended] = []
    for name in names:
        flags = [*(["--quick"] if found.quick else []), *([] if name in WITHOUT_SEED else [f"--seed={found.seed}"])]
        flags += ["--install"] if name == "rivals" and not found.quick else []
        results.append(run_one(name, flags))
    for result in results:
        if result.exit_code:
            print(f"{result.name} could not be run: exit code {result.exit_code}")
        for text in result.missed:
            print(f"{result.name} missed: {text}")
    if found.json is not None:
        found.json.write_text(json.dumps({result.name: result.values for result in results}, indent=1) + "\n")
    return int(any(result.exit_code for result in results))


if __name__ == "__main__":
    sys.exit(main())
