"""Runs of the full product of layouts, failures and features in random order, until the time is over.

Prints one line a run and, for each one that fails, everything that is known about it. Ends with 1 if any failed.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "integration"))

from covering import check_scenario
from harness import make_ground
from resident import Resident, resident_zygote
from scenario import SOAK_FEATURES, Scenario, full_product


def main() -> int:
    arguments = read_arguments()
    scenarios = [
        replace(scenario, features=scenario.features | frozenset(more))
        for scenario in map(Scenario.of, full_product())
        for more in ((), SOAK_FEATURES)
    ]
    scenarios = [scenario for scenario in scenarios if arguments.only in scenario.name]
    random.Random(arguments.seed).shuffle(scenarios)
    sys.stdout.write(f"{len(scenarios)} runs in the product; seed {arguments.seed}, {arguments.minutes:g} minutes\n")
    with resident_zygote() as resident:
        passed, failed = soak(cycle(scenarios) if arguments.repeat else scenarios, arguments.minutes, resident)
    for name in failed:
        sys.stdout.write(f"failed: {name} (again: --only {name})\n")
    sys.stdout.write(f"{passed} passed, {len(failed)} failed\n")
    return 1 if failed else 0


def soak(scenarios: Iterable[Scenario], minutes: float, resident: Resident) -> tuple[int, list[str]]:
    """How many passed, and the names of those that did not."""
    started_at = time.monotonic()
    passed, failed = 0, []
    for scenario in scenarios:
        if time.monotonic() - started_at >= minutes * 60:
            break
        problem, seconds = attempt(scenario, resident)
        if problem:
            failed.append(scenario.name)
            sys.stdout.write(f"{problem}\n")
        else:
            passed += 1
        verdict = "FAILED" if problem else "ok"
        sofar = (time.monotonic() - started_at) / 60
        sys.stdout.write(
            f"{sofar:6.1f} min  {passed} ok, {len(failed)} failed  {verdict}  {scenario.name}  {seconds:.1f} s\n"
        )
        sys.stdout.flush()
    return passed, failed


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=30.0, help="when to stop (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="order of the runs (default 0)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs with this text in their name")
    parser.add_argument("--repeat", action="store_true", help="begin again at the end, until the time is over")
    return parser.parse_args()


def attempt(scenario: Scenario, resident: Resident) -> tuple[str, float]:
    """What went wrong, empty where all is well, and how long it took."""
    started_at = time.monotonic()
    problem = ""
    with tempfile.TemporaryDirectory(prefix="soak") as work, make_ground(Path(work), resident) as ground:
        try:
            check_scenario(ground, scenario)
        except AssertionError as error:
            problem = f"{scenario.name}: {error}"
    return problem, time.monotonic() - started_at


if __name__ == "__main__":
    sys.exit(main())
