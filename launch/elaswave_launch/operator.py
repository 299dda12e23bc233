"""The `elaswave` command: looks at and acts on a running job of this user on this machine."""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NoReturn

from elaswave.core.ids import Step, WorkerId
from elaswave.core.injection import ACTIONS, DEFAULT_FACTOR, PHASES, Injection, check_factor
from elaswave.errors import ConfigError, PeerError
from elaswave_launch.rundir import RunningJob, base_folder, running_jobs
from elaswave_launch.texts import incident_values, status_text, status_values
from elaswave_launch.wire import Operator

FAILED = 1
REFUSED = 93

_EPILOG = """\
examples:
  elaswave status --json
  elaswave inject kill --worker 1
  elaswave inject slow --worker 1 --factor 4 --step 20 --phase backward
  elaswave stop --job run7

exit codes: 0 done, 1 no such job or worker, or no answer, 93 wrong arguments."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: see {self.prog} --help")


def main() -> int:
    """Entry point of the `elaswave` command."""
    return operate(sys.argv[1:], os.environ)


def operate(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run one command and return its exit code: 0 done, 1 no such job or no answer, 93 wrong arguments."""
    try:
        found = _build_parser().parse_args(list(arguments))
        action = _action(found)
    except ConfigError as error:
        sys.stderr.write(f"elaswave: {error}\n")
        return REFUSED
    try:
        running = _choose(running_jobs(base_folder(environment)), found.job)
        asyncio.run(_call(running, action))
    except (ConfigError, PeerError) as error:
        sys.stderr.write(f"elaswave: {error}\n")
        return FAILED
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="elaswave",
        description="Operate a running job.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    status = commands.add_parser("status", help="the job and every worker", allow_abbrev=False)
    incidents = commands.add_parser("incidents", help="failures and planned changes so far", allow_abbrev=False)
    inject = commands.add_parser("inject", help="cause a fault", allow_abbrev=False)
    stop = commands.add_parser("stop", help="end the job", allow_abbrev=False)
    for command in (status, incidents, inject, stop):
        command.add_argument("--job", default="", metavar="ID", help="which one, where several are running")
    for command in (status, incidents):
        command.add_argument("--json", action="store_true", help="as JSON (docs/report.md)")
    inject.add_argument("action", choices=ACTIONS)
    inject.add_argument("--worker", required=True, metavar="W", help="id of the worker, as in status")
    inject.add_argument("--step", metavar="K", help="at this step; by default at once")
    inject.add_argument("--phase", default="any", choices=PHASES, help="in this phase of the step")
    inject.add_argument("--factor", metavar="F", help=f"with slow: how many times longer (default {DEFAULT_FACTOR:g})")
    return parser


def _action(found: argparse.Namespace) -> Callable[[Operator], Awaitable[None]]:
    match found.command:
        case "status":
            return _show_status_json if found.json else _show_status
        case "incidents":
            return _show_incidents_json if found.json else _show_incidents
        case "inject":
            injection = _injection(found)
            return lambda operator: operator.inject(injection)
        case _:
            return lambda operator: operator.stop("elaswave stop")


def _injection(found: argparse.Namespace) -> Injection:
    slow = found.action == "slow"
    if found.factor is not None and not slow:
        raise ConfigError(f"--factor {found.factor}: goes with slow only")
    if found.phase != "any" and found.step is None:
        raise ConfigError(f"--phase {found.phase}: needs --step K")
    factor = 0.0
    if slow:
        try:
            factor = check_factor(DEFAULT_FACTOR if found.factor is None else float(found.factor))
        except ValueError as error:
            raise ConfigError(f"--factor {found.factor}: must be a number above 1") from error
    return Injection(
        action=found.action,
        worker=WorkerId(_natural("--worker", found.worker)),
        step=None if found.step is None else Step(_natural("--step", found.step)),
        phase=found.phase,
        factor=factor,
    )


def _natural(flag: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):  # noqa: PLR2004 - fits every counter on the wire
        raise ConfigError(f"{flag} {text}: must be a whole number from 0")
    return int(text)


def _choose(jobs: Sequence[RunningJob], wanted: str) -> RunningJob:
    names = ", ".join(running.job for running in jobs)
    if wanted:
        for running in jobs:
            if running.job == wanted:
                return running
        raise ConfigError(f"--job {wanted}: no such job is running; there are: {names or 'none'}")
    if not jobs:
        raise ConfigError("no job of this user is running on this machine")
    if len(jobs) > 1:
        raise ConfigError(f"several jobs are running, choose one with --job: {names}")
    return jobs[0]


async def _call(running: RunningJob, action: Callable[[Operator], Awaitable[None]]) -> None:
    operator = Operator(running.address, running.token, running.tls)
    try:
        await action(operator)
    finally:
        await operator.close()


async def _show_status(operator: Operator) -> None:
    sys.stdout.write(status_text(await operator.status()))


async def _show_status_json(operator: Operator) -> None:
    sys.stdout.write(json.dumps(status_values(await operator.status()), indent=1) + "\n")


async def _show_incidents(operator: Operator) -> None:
    from elaswave_launch.display import describe_incident  # noqa: PLC0415 - only here

    for incident in (await operator.status()).incidents:
        sys.stdout.write(describe_incident(incident) + "\n")


async def _show_incidents_json(operator: Operator) -> None:
    incidents = (await operator.status()).incidents
    sys.stdout.write(json.dumps([incident_values(incident) for incident in incidents], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
