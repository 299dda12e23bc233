"""The delay that a killed worker causes: ElasWave beside TorchFT and beside torchrun with a checkpoint every 20 steps.

    python benchmarks/rivals.py [--install] [--quick] [--json FILE]

Four workers, the same small perceptron, AdamW, and 50 ms of an emulated device (a sleep) per worker and step. In every
round each system is started, stands SIGKILLs of random workers at random moments, each when all four are in steady
training again, and is stopped. Workers are restarted at once: by the launcher in ElasWave and torchrun, by this script
in TorchFT, whose replica groups have to be restarted from outside.

Stall: the longest time between two steps of a survivor from the kill until all four have trained on for a while, less
the median step before the kill; in TorchFT between two steps that are committed, of the worst survivor. Behind: from
the last step before the kill until a step with a higher number is done, less a median step; only in torchrun, which
goes back to a checkpoint, is that longer. Lost work: hops done again as a share of a step in ElasWave (at most the dead
worker's quarter), steps done again in torchrun, steps that a survivor discards in TorchFT.

TorchFT is installed by --install into a virtual environment inside the one that runs this, sharing its torch.
"""

import random
import subprocess
import sys
import sysconfig
import venv
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import Options, Row, Target, make_parser, options_of, paired_ratios, run, say
from launching import Place, make_place
from rival_systems import WORLD, Disturbance, ElasWave, System, TorchFT, Torchrun

TORCHFT_VERSION = "2026.10.26"
TORCHFT_NEEDS = ("opentelemetry-sdk", "opentelemetry-api", "opentelemetry-exporter-otlp-proto-http")
INSTALL_LIMIT_S = 600.0
RIVALS = Path(sys.prefix) / "rivals"
"""Inside the virtual environment: nothing that looks at the sources sees it, and it goes with it."""

LEAST_S = 1e-3
"""Delays below it count as this long in ratios."""


def rival_python() -> Path | None:
    """The interpreter that has TorchFT; None where it is not installed."""
    python = RIVALS / "bin" / "python"
    if not python.exists():
        return None
    tried = subprocess.run([python, "-c", "import torchft"], capture_output=True, check=False, timeout=120)
    return python if tried.returncode == 0 else None


def install_torchft() -> str:
    """Install it; returns why it could not be, or nothing."""
    venv.create(RIVALS, with_pip=True, clear=True)
    here = sysconfig.get_path("purelib")
    folder = sysconfig.get_path("purelib", vars={"base": str(RIVALS), "platbase": str(RIVALS)})
    Path(folder, "shared.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    pip = [str(RIVALS / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for packages in (TORCHFT_NEEDS, ("--no-deps", "--pre", f"torchft-nightly=={TORCHFT_VERSION}")):
        done = subprocess.run([*pip, *packages], capture_output=True, text=True, check=False, timeout=INSTALL_LIMIT_S)
        if done.returncode:
            return done.stderr.strip().splitlines()[-1]
    return "" if rival_python() else "it is installed but cannot be imported"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A system and how to start it."""

    name: str
    start: Callable[[Place], System]


def measure_round(contender: Contender, kills: int, generator: random.Random) -> list[Disturbance]:
    """Start the system, kill, stop it."""
    found: list[Disturbance] = []
    with make_place() as place:
        system = contender.start(place)
        for number in range(kills):
            found.append(system.disturb(generator))
            say(f"{contender.name}: kill {number + 1} of {kills}, stall {found[-1].stall_s:.2f} s")
    return found


def rows_of(found: dict[str, list[Disturbance]]) -> list[Row]:
    """The table."""
    rows = [
        Row(what=f"{name}: undisturbed step", unit="ms", figures=[1e3 * one.normal_s for one in all_of])
        for name, all_of in found.items()
    ]
    for name, all_of in found.items():
        ours = name == "ElasWave"
        stalls, lost = [one.stall_s for one in all_of], [one.lost_steps for one in all_of]
        goal = Target(of="max", limit=0.5, goal=True) if ours else None
        rows.append(Row(what=f"{name}: stall", unit="s", figures=stalls, target=goal))
        rows.append(Row(what=f"{name}: behind", unit="s", figures=[one.behind_s for one in all_of]))
        one_share = Target(of="max", limit=1 / WORLD) if ours else None
        rows.append(Row(what=f"{name}: lost work", unit="steps", figures=lost, target=one_share))
    least = [max(LEAST_S, one.stall_s) for one in found["ElasWave"]]
    for name, all_of in found.items():
        if name != "ElasWave":
            theirs = [one.stall_s for one in all_of]
            rows.append(Row(what=f"stall: {name} / ElasWave", unit="x", figures=paired_ratios(theirs, least)))
    return rows


def measure(found: Namespace, options: Options) -> tuple[list[Row], list[str]]:
    """All rounds: the table, and what is to be said below it."""
    problem = install_torchft() if found.install and rival_python() is None else ""
    python = rival_python()
    contenders = [
        Contender(name="ElasWave", start=lambda place: ElasWave(place, found.kills)),
        Contender(name="torchrun", start=Torchrun),
    ]
    notes = [f"torchrun: --max-restarts, a checkpoint every {Torchrun.CHECKPOINT_EVERY} steps"]
    if python is not None:
        contenders.append(Contender(name="TorchFT", start=lambda place: TorchFT(place, python)))
        notes.append(f"TorchFT: torchft-nightly {TORCHFT_VERSION}, gloo timeout 5 s as in its example")
    else:
        notes.append(f"TorchFT was not measured: {problem or 'not installed, run this with --install'}")
    results: dict[str, list[Disturbance]] = {contender.name: [] for contender in contenders}
    for number in range(found.rounds):
        for contender in _in_turn(contenders, number):
            generator = random.Random(f"{options.seed} {number}")
            results[contender.name] += measure_round(contender, found.kills, generator)
    return rows_of(results), notes


def _in_turn(contenders: Sequence[Contender], number: int) -> list[Contender]:
    start = number % len(contenders)
    return [*contenders[start:], *contenders[:start]]


def main() -> None:
    """Measure."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, metavar="N", help="starts of each system (default: 3, with --quick 1)")
    parser.add_argument("--kills", type=int, metavar="N", help="kills in each (default: 3, with --quick 1)")
    parser.add_argument("--install", action="store_true", help="install TorchFT first, where it is not")
    found = parser.parse_args()
    found.rounds = found.rounds or (1 if found.quick else 3)
    found.kills = found.kills or (1 if found.quick else 3)
    options = options_of("rivals", found)
    options.finish(*measure(found, options))


if __name__ == "__main__":
    run(main)
