"""From a bare process to the user's script running as `__main__`: shared by forked and spawned workers.

As a program (`python -m elaswave.runtime.bootstrap --parent-pid N --tied-fd D [--module] -- TARGET ARGS`) it is the
spawn start; it closes descriptor D when its life is tied to the parent's.

A worker makes no session or process group of its own: what its starter's group is told by a terminal or by
`kill -- -PGID` reaches it too. Nothing depends on that when something dies, as every process is tied to its parent by
the kernel. It ignores SIGINT, because only the launcher decides how a job ends after Ctrl-C.
"""

import argparse
import atexit
import faulthandler
import gc
import io
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from elaswave.core.events import WorkerFailed
from elaswave.core.ids import WorkerId
from elaswave.errors import ConfigError, ElasWaveError, JobError, NonFiniteError, UserCodeError
from elaswave.lifeline import end_with_parent
from elaswave.priority import be_ordinary, be_patient
from elaswave.process_start import Program, StartRequest
from elaswave.runtime.agent_link import report_failure

REPORT_LIMIT_S = 5.0
"""The agent answers a report at once unless it is stopped; the exit must not wait for that."""

_PACKAGE_FOLDER = Path(__file__).resolve().parent.parent


def take_over(request: StartRequest) -> None:
    """Turn this process, a fresh fork, into the one that `request` describes. Raises OSError for folders and files."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.working_directory)
    _redirect(os.devnull, os.O_RDONLY, 0)
    _redirect(request.stdout, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 1)
    _redirect(request.stderr, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 2)
    _set_torch_threads(os.environ.get("OMP_NUM_THREADS", "1"))


def run_worker(program: Program) -> NoReturn:
    """Run the script, then end the process; a failure is told to the agent, once, and on stderr."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        be_patient()  # others train
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    # Lines of a worker that is killed must not be lost in a buffer.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
    # What the script leaves is held to the end: a file in a cycle that is collected loses what it has not written yet.
    held: object
    try:
        held = _run_as_main(program)
        code = 0
    except SystemExit as stop:
        held = stop
        code = _end_by_exit(stop)
    except BaseException as error:  # outermost frame of the process: reports whatever the script raised
        held = error
        text = _trace(error)
        sys.stderr.write(text or f"{_summary(error)}\n")
        tell_failure(_kind(error), _summary(error), text)
        code = 1
    end_process(code, held)


def end_process(code: int, _held: object = None) -> NoReturn:
    """What the interpreter does at its end, less the taking apart of all modules.

    That takes 0.3 s of a processor with torch (measured) and would copy the pages that a fork shares.
    """
    threading._shutdown()  # type: ignore[attr-defined] # as multiprocessing does; also ends idle executor threads
    atexit._run_exitfuncs()
    # Files left open are flushed, text before the bytes that it becomes.
    for kind in (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom):
        for found in gc.get_objects():
            if issubclass(type(found), kind):
                with suppress(OSError, ValueError):  # closed, or its disk is full: as at any interpreter's end
                    found.flush()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def tell_failure(kind: str, message: str, trace: str) -> None:
    """Tell the agent named in the environment why this worker ends; without an agent stderr has to do."""
    path = os.environ.get("ELASWAVE_AGENT_SOCK")
    worker = os.environ.get("ELASWAVE_WORKER")
    if path is None or worker is None:
        return
    failure = WorkerFailed(worker=WorkerId(int(worker)), kind=kind, message=message, traceback=trace)
    try:
        report_failure(path, failure, REPORT_LIMIT_S)
    except (OSError, ElasWaveError) as error:
        sys.stderr.write(f"elaswave: worker {worker} could not report its failure to the agent at {path}: {error}\n")


def _run_as_main(program: Program) -> Mapping[str, object]:
    """Run as `__main__`; returns the script's globals."""
    sys.argv = [program.target, *program.arguments]
    if program.is_module:
        _set_first_path(os.getcwd())
        return runpy.run_module(program.target, run_name="__main__", alter_sys=True)
    _set_first_path(str(Path(program.target).resolve().parent))
    return runpy.run_path(program.target, run_name="__main__")


def _set_first_path(folder: str) -> None:
    """What `python SCRIPT` would put first on the path, unless the user wants nothing there."""
    if os.environ.get("PYTHONSAFEPATH"):
        return
    # With -m alone the first entry is the working directory; -P, which launcher and agent give, leaves it out.
    sys.path[:1] = [folder, *sys.path[:1]] if sys.flags.safe_path else [folder]


def _end_by_exit(stop: SystemExit) -> int:
    """The exit code as the interpreter would make it; a failing one is the script's failure, not a crash."""
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        code = stop.code & 0xFF
    else:
        sys.stderr.write(f"{stop.code}\n")
        code = 1
    if code:
        reason = stop.code if isinstance(stop.code, str) else f"exit code {code}"
        trace = "".join(traceback.format_exception(type(stop), stop, _of_script(stop.__traceback__)))
        tell_failure("user", f"the script ended by SystemExit: {reason}", trace)
    return code


def _kind(error: BaseException) -> str:
    """Kind of WorkerFailed: whose fault the end of the script is."""
    if isinstance(error, ConfigError):
        return "config"
    if isinstance(error, NonFiniteError):
        return "non-finite"
    if isinstance(error, ElasWaveError):
        return "user" if isinstance(error, JobError) else "bug"
    return "bug" if _raised_by_us(error) else "user"


def _raised_by_us(error: BaseException) -> bool:
    frames = traceback.extract_tb(_of_script(error.__traceback__))
    return bool(frames) and Path(frames[-1].filename).is_relative_to(_PACKAGE_FOLDER)


def _trace(error: BaseException) -> str:
    """The traceback that helps: of the user's code, from its first frame on; none where the message says all."""
    if isinstance(error, UserCodeError) and error.__cause__ is not None:
        cause = error.__cause__
        found = cause.__traceback__
        while found is not None and Path(found.tb_frame.f_code.co_filename).is_relative_to(_PACKAGE_FOLDER):
            found = found.tb_next
        return "".join(traceback.format_exception(type(cause), cause, found, chain=False))
    if isinstance(error, JobError | ConfigError):
        return ""
    return "".join(traceback.format_exception(type(error), error, _of_script(error.__traceback__)))


def _summary(error: BaseException) -> str:
    if isinstance(error, JobError | ConfigError):
        return str(error)
    return "".join(traceback.format_exception_only(error)).strip()


def _of_script(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames that lead to the script; the whole one where the script was never entered."""
    found = trace
    while found is not None and _is_wrapper(found.tb_frame.f_code.co_filename):
        found = found.tb_next
    return found or trace


def _is_wrapper(filename: str) -> bool:
    return filename in {__file__, runpy.__file__, "<frozen runpy>"}


def _redirect(path: str, flags: int, descriptor: int) -> None:
    opened = os.open(path, flags | os.O_CLOEXEC, 0o644)
    os.dup2(opened, descriptor)
    os.close(opened)


def _set_torch_threads(setting: str) -> None:
    """OMP_NUM_THREADS was read when torch was loaded, which in a fork is long ago."""
    if "torch" not in sys.modules:
        return
    first = setting.split(",", maxsplit=1)[0]
    if not first.isdecimal() or int(first) < 1:
        raise ConfigError(f"OMP_NUM_THREADS={setting!r}: must be a number from 1 on")
    sys.modules["torch"].set_num_threads(int(first))


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry of the spawn start; environment, working directory and output are set by whoever spawned."""
    given = sys.argv[1:] if arguments is None else arguments
    place = given.index("--")
    target, *rest = given[place + 1 :]
    parser = argparse.ArgumentParser(prog="python -m elaswave.runtime.bootstrap")
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--tied-fd", type=int, required=True)
    parser.add_argument("--module", action="store_true")
    options = parser.parse_args(given[:place])
    end_with_parent(options.parent_pid)
    os.close(options.tied_fd)  # the parent waits for it
    be_ordinary()
    run_worker(Program(target=target, arguments=tuple(rest), is_module=options.module))


if __name__ == "__main__":
    main()
