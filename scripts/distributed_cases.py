"""Runs every case of torch's own distributed suite (torch.testing._internal.distributed) with a backend.

Prints one line a case: passed, failed, or not applicable with the rule and the reason. Each case runs in processes of
its own, as many as the suite wants for it: 3, or 4 or 8 where it skips the case for fewer.

examples:
  distributed_cases.py                        all cases with backend elastic
  distributed_cases.py --fast                 twelve of them, in a minute
  distributed_cases.py --backend gloo         the same with gloo, to compare
  distributed_cases.py --only 'test_all_*'    cases by name; without * or ? by a part of it
  distributed_cases.py --list                 what applies and why not, without a run
  distributed_cases.py --json cases.json      all that is known, with the output of failed cases

Ends with 1 if an applicable case fails, with 2 if nothing could be run.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from distributed_processes import adopt_orphans, sweep
from distributed_rules import WORLD_SIZE_RULE, Exemption, exemption_by_name, exemption_by_text

PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not applicable"
WORLD_SIZES: Final = (3, 4, 8)
SHOWN: Final = 2000  # characters on the terminal of what a failed case says; --json keeps more
SMALLEST, LARGEST = 2, 8  # of the world sizes that the suite has skip texts for

# The suite knows backends by name. Each of these runs the cases that it runs with one of the named; gloo comes first.
# All-to-all on the CPU is tried with mpi only.
LIKE: Final = {"gloo": ("gloo",), "elastic": ("gloo", "mpi")}

FAST: Final = (
    "test_DistributedDataParallelCPU",
    "test_accumulate_gradients_no_sync",
    "test_all_gather",
    "test_all_gather_object_default_pg",
    "test_all_reduce_full_group_max",
    "test_all_reduce_sum_async",
    "test_barrier",
    "test_broadcast",
    "test_gather",
    "test_reduce_product",
    "test_scatter",
    "test_send_recv_any_source",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the suite is told while it is imported."""

    like: str
    world_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How all cases run. work: a folder for all that is written meanwhile; start: a way of multiprocessing."""

    work: Path
    limit_s: float
    start: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What became of a case; `rule` where it does not apply."""

    case: str
    outcome: str
    world_size: int
    rule: str = ""
    reason: str = ""
    seconds: float = 0.0
    error: str = ""
    log: str = ""


class SuiteProcess:
    """The suite in a process of its own, for one setting."""

    def __init__(self, backend: str, setting: Setting, options: Options) -> None:
        environment = {
            **os.environ,
            "BACKEND": setting.like,
            "WORLD_SIZE": str(setting.world_size),
            "INIT_METHOD": "file://",  # the suite makes a file for each case later
            "DISTRIBUTED_TESTS_DEFAULT_TIMEOUT": str(int(options.limit_s)),
            "CASES_BACKEND": backend,
            "CASES_START": options.start,
            "TMPDIR": str(options.work),  # torch makes folders for what it compiles
            "CUDA_VISIBLE_DEVICES": "",  # the suite skips everything where it finds fewer GPUs than processes
            "OMP_NUM_THREADS": "1",
        }
        self._options = options
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("distributed_suite.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self.skips: dict[str, str | None] = json.loads(self._answer())
        """Why the suite skips each case; None for one that it runs."""

    def run(self, case: str) -> dict[str, str | float]:
        assert self._process.stdin is not None
        folder = self._options.work / "case"
        folder.mkdir()
        request = {"case": case, "folder": str(folder), "limit_s": self._options.limit_s}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer: dict[str, str | float] = json.loads(self._answer())
        shutil.rmtree(folder)
        return answer

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.stderr.write("the process with the suite ended: see above\n")
            sys.exit(2)
        return line


class Suite:
    """All cases with one backend."""

    def __init__(self, backend: str, world_sizes: Sequence[int], options: Options) -> None:
        self._backend = backend
        first, *others = LIKE[backend]
        self._main = [Setting(like=first, world_size=size) for size in world_sizes]
        self._settings = self._main + [Setting(like=other, world_size=world_sizes[0]) for other in others]
        self._options = options
        self._processes: dict[Setting, SuiteProcess] = {}

    def names(self) -> list[str]:
        return sorted(self._process(self._settings[0]).skips)

    def choose(self, case: str) -> Setting | Row:
        """Where to run the case, or its row where nothing is to be run."""
        for setting in self._settings:
            if self._process(setting).skips[case] is None:
                exemption = exemption_by_name(case, self._backend)
                return setting if exemption is None else exempted(case, setting, exemption)
        rows = [skipped(case, setting, self._process(setting).skips[case] or "") for setting in self._main]
        # Where it is skipped for another reason too, another world size would not help it.
        return next((row for row in rows if row.rule != WORLD_SIZE_RULE), rows[0])

    def run(self, case: str, setting: Setting) -> Row:
        answer = self._process(setting).run(case)
        seconds, error = float(answer["seconds"]), str(answer["error"])
        if answer["skipped"]:
            return skipped(case, setting, str(answer["skipped"]), seconds)
        return Row(
            case=case,
            outcome=FAILED if error else PASSED,
            world_size=setting.world_size,
            reason=last_error(error),
            seconds=seconds,
            error=error,
            log=str(answer["log"]) if error else "",
        )

    def _process(self, setting: Setting) -> SuiteProcess:
        if setting not in self._processes:
            self._processes[setting] = SuiteProcess(self._backend, setting, self._options)
        return self._processes[setting]


def skipped(case: str, setting: Setting, text: str, seconds: float = 0.0) -> Row:
    """The row of a case that the suite skips with `text`."""
    exemption = exemption_by_text(text)
    if exemption is not None:
        return exempted(case, setting, exemption, seconds)
    reason = f"skipped for what no rule names: {text}"
    return Row(case=case, outcome=FAILED, world_size=setting.world_size, reason=reason, seconds=seconds)


def exempted(case: str, setting: Setting, exemption: Exemption, seconds: float = 0.0) -> Row:
    return Row(case=case, outcome=NOT_APPLICABLE, world_size=setting.world_size, seconds=seconds, **asdict(exemption))


def last_error(text: str) -> str:
    """The line of a traceback that names the exception."""
    named: list[str] = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception|Changed|Exit|Interrupt)\b.*$", text, re.MULTILINE)
    # The suite's own process tells of its processes' tracebacks in one of its own: the first that is named is theirs.
    theirs = [line for line in named if not re.match(r"RuntimeError: Process \d+ exited with error", line)]
    return (theirs or named or [text.strip()])[0]


def main() -> int:
    arguments = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    adopt_orphans()
    started_at = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cases") as work:
        try:
            rows = run(arguments, Path(work))
        finally:
            sweep()
    if not rows:
        sys.stderr.write(f"no case is named like {arguments.only!r}: see --list\n")
        return 2
    if arguments.json is not None:
        write_json(arguments.json, arguments.backend, rows)
    if not arguments.list:
        tell_failures(rows)
        sys.stdout.write(f"{summary(arguments.backend, rows)}; {time.monotonic() - started_at:.0f} s\n")
    return 1 if any(row.outcome == FAILED for row in rows) else 0


def run(arguments: argparse.Namespace, work: Path) -> list[Row]:
    """Run, or only look at, the chosen cases."""
    sizes = WORLD_SIZES if arguments.world_size is None else (arguments.world_size,)
    options = Options(work=work, limit_s=arguments.limit, start="spawn" if arguments.spawn else "fork")
    suite = Suite(arguments.backend, sizes, options)
    cases = [case for case in suite.names() if is_chosen(case, arguments)]
    return list(report(suite, cases, arguments.list))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=sorted(LIKE), default="elastic", help="default: elastic")
    parser.add_argument(
        "--world-size",
        type=int,
        choices=range(SMALLEST, LARGEST + 1),
        metavar="N",
        help="the same for all cases; a case that wants more does not apply (default: 3, 4 or 8)",
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="only cases with such a name")
    parser.add_argument("--fast", action="store_true", help=f"only {len(FAST)} cases that end within a minute")
    parser.add_argument("--list", action="store_true", help="run nothing: list the cases and what applies")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--limit", type=float, default=100.0, metavar="SECONDS", help="of one case (default 100)")
    parser.add_argument(
        "--spawn", action="store_true", help="start processes anew, not as copies: slow, the same cases"
    )
    return parser.parse_args()


def is_chosen(case: str, arguments: argparse.Namespace) -> bool:
    pattern = arguments.only if set("*?[") & set(arguments.only) else f"*{arguments.only}*"
    return fnmatchcase(case, pattern) and (case in FAST or not arguments.fast)


def report(suite: Suite, cases: Sequence[str], list_only: bool) -> Iterator[Row]:
    """Run and print the cases, one after the other."""
    width = max(map(len, cases), default=0)
    for case in cases:
        chosen = suite.choose(case)
        if isinstance(chosen, Row):
            row = chosen
        elif list_only:
            row = Row(case=case, outcome="applies", world_size=chosen.world_size)
        else:
            row = suite.run(case, chosen)
        sys.stdout.write(f"{line_of(row, width)}\n")
        sys.stdout.flush()
        yield row


def line_of(row: Row, width: int) -> str:
    took = f"{row.world_size} processes {row.seconds:5.1f} s" if row.seconds else ""
    why = f"{row.rule}: {row.reason}" if row.rule else row.reason
    return f"{row.outcome:14}  {row.case:{width}}  {took:19}  {why}".rstrip()


def tell_failures(rows: Sequence[Row]) -> None:
    for row in rows:
        if row.error:
            sys.stdout.write(f"\n---- {row.case}, {row.world_size} processes: the last of its output, and its error\n")
            sys.stdout.write(f"{row.log.strip()[-SHOWN:]}\n----\n{row.error.strip()[-SHOWN:]}\n")


def summary(backend: str, rows: Sequence[Row]) -> str:
    counts = Counter(row.outcome for row in rows)
    rules = Counter(row.rule for row in rows if row.rule)
    which = ", ".join(f"{rule} {count}" for rule, count in rules.most_common())
    told = f"{counts[NOT_APPLICABLE]} not applicable" + (f" ({which})" if which else "")
    return f"{backend}: {counts[PASSED]} passed, {counts[FAILED]} failed, {told} of {len(rows)}"


def write_json(path: Path, backend: str, rows: Sequence[Row]) -> None:
    counts = Counter(row.outcome for row in rows)
    path.write_text(
        json.dumps({"backend": backend, "counts": counts, "cases": [asdict(row) for row in rows]}, indent=1)
    )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(128 + signal.SIGINT)
