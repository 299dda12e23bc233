"""elaswave-launch: from a command line to the exit code of a job."""

import os
import sys
from collections.abc import Mapping, Sequence

from elaswave.errors import ConfigError
from elaswave_launch.children import start_children
from elaswave_launch.commands import HeldPort, Place, all_commands, free_port, hold_port
from elaswave_launch.flags import notes, parse
from elaswave_launch.options import read_options
from elaswave_launch.preflight import Launch, check_machine, find_devices
from elaswave_launch.rundir import RunFolder, RunningJob, base_folder, create_run_folder
from elaswave_launch.signals import Signals

REFUSED = 93
"""Refused before the first step: asking again changes nothing."""


def main() -> int:
    """Entry point of the `elaswave-launch` command."""
    return launch(sys.argv[1:], os.environ)


def launch(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a job and return its exit code. Call it from the main thread of a process with one thread."""
    try:
        parsed = parse(arguments, environment)
        ready = check_machine(read_options(parsed, find_devices()), environment)
        folder = create_run_folder(base_folder(environment), ready.options.job, ready.options.first_node)
    except ConfigError as error:
        return _refuse(error)
    except OSError as error:  # a path that the file system does not take: too long, or in a folder that is not ours
        return _refuse(ConfigError(f"{error.filename}: {error.strerror}; give another path"))
    try:
        for note in notes(parsed):
            sys.stderr.write(f"elaswave-launch: {note}\n")
        return _run(ready, folder, environment)
    except ConfigError as error:
        return _refuse(error)
    finally:
        folder.remove()


def _run(ready: Launch, folder: RunFolder, environment: Mapping[str, str]) -> int:
    options = ready.options
    held: HeldPort | None = None
    try:
        if options.starts_controller:
            held = hold_port(options.host, options.port)
        place = Place(
            job=folder.job,
            run_dir=folder.path,
            log_dir=options.log_dir or folder.path / "logs",
            token_file=folder.write_token(ready.token),
            port=options.port if held is None else held.port,
            master_port=free_port(options.host) if held is not None else options.port + 1,
        )
        _make_folders(ready, place)
        signals = Signals(options.end_signals)
        signals.install()
        children = start_children(all_commands(ready, place, environment), lambda: signals.first is not None)
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"{host}:{place.port}"
        if held is not None:
            folder.publish(
                RunningJob(job=place.job, address=address, pid=os.getpid(), token=ready.token, tls=ready.tls)
            )
        # Only now: these imports take as long as everything before, and the children are on their way meanwhile.
        from elaswave_launch.session import run_session  # noqa: PLC0415

        return run_session(ready, place, children, signals, address)
    finally:
        if held is not None:
            held.close()


def _make_folders(ready: Launch, place: Place) -> None:
    for folder in filter(None, (place.job_logs, ready.options.save_dir)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the folder {folder}: {error.strerror}") from error


def _refuse(error: ConfigError) -> int:
    first_line = " ".join(str(error).split())
    sys.stderr.write(f"elaswave-launch: {first_line}\n")
    return REFUSED


if __name__ == "__main__":
    sys.exit(main())
