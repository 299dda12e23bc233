"""A worker without torch, for tests of the agent: what it does is its first argument."""

import atexit
import os
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TextIO

from elaswave.core.events import JobDescription, StopRequested, UserLine, WorkerReady
from elaswave.core.ids import Step, WorkerId
from elaswave.errors import ConfigError, InvariantError, NonFiniteError
from elaswave.runtime.agent_link import AgentLink, Delivery

WORKER = WorkerId(int(os.environ["ELASWAVE_WORKER"]))
ALIVE_PERIOD_S = 0.05
LEFT_OPEN: list[TextIO] = []


def main() -> None:
    mode, *arguments = sys.argv[1:]
    match mode:
        case "exit":
            sys.exit(int(arguments[0]))
        case "exit-text":
            sys.exit(" ".join(arguments))
        case "raise":
            raise {
                "ValueError": ValueError,
                "ConfigError": ConfigError,
                "NonFiniteError": NonFiniteError,
                "InvariantError": InvariantError,
                "KeyboardInterrupt": KeyboardInterrupt,
            }[arguments[0]](" ".join(arguments[1:]))
        case "environment":
            say([f"{name}={os.environ[name]}" for name in arguments])
        case "print":
            print("to stdout", flush=False)
            print("to stderr", file=sys.stderr)
        case "facts":
            say([repr(sys.argv), repr(__name__), sys.path[0], str(len(os.listdir("/proc/self/fd")) - 1)])
        case "serve":
            serve(stepping=True)
        case "idle":
            serve(stepping=False)
        case "wait":
            threading.Event().wait()
        case "leave-open":
            leave_open(arguments[0])
        case "last-words":
            # Many messages right before the end: none may be lost.
            say([f"line {index}" for index in range(int(arguments[0]))])
            if arguments[1:]:
                os.kill(os.getpid(), int(arguments[1]))
        case "hang":
            # Worker 0 hangs; the others have announced that they will be silent.
            link = open_link(queue.SimpleQueue())
            link.progress.begin(Step(3), "backward")
            with link.progress.long_operation(0.0 if WORKER == 0 else 1000.0):
                threading.Event().wait()
        case "garbage":
            link = open_link(queue.SimpleQueue())
            link._socket.send(b"\x00\x00\x00\x03abc")  # type: ignore[union-attr]
            threading.Event().wait()
        case "refuse-delivery":
            serve_refusing()


def open_link(inbox: "queue.SimpleQueue[Delivery]") -> AgentLink:
    link = AgentLink(os.environ["ELASWAVE_AGENT_SOCK"], WORKER, inbox.put)
    link.open()
    return link


def say(lines: list[str]) -> None:
    link = open_link(queue.SimpleQueue())
    for line in lines:
        link.send(UserLine(worker=WORKER, text=line))
    link.close()


def leave_open(path: str) -> None:
    """Everything that the end of an interpreter has to put in order."""
    LEFT_OPEN.append(open(path, "w"))  # noqa: SIM115
    LEFT_OPEN[0].write("flushed\n")
    atexit.register(lambda: print("exit function"))
    pool = ThreadPoolExecutor()
    pool.submit(lambda: None).result()
    threading.Thread(target=lambda: print("thread"), daemon=False).start()
    sys.stdout.write("no newline")


def serve(stepping: bool) -> None:
    """Show signs of life and echo what is delivered, until told to stop."""
    inbox: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    link = open_link(inbox)
    if stepping:
        link.progress.begin(Step(7), "forward")
        link.progress.hop(Step(7), 3, backward=False, done=False)
    job = JobDescription(layers=(), steps=1, micro_batches=1, digest="d")
    link.send(WorkerReady(worker=WORKER, address="unix:/nowhere", job=job, fingerprint="f"))
    while True:
        try:
            told = inbox.get(timeout=ALIVE_PERIOD_S)
        except queue.Empty:
            link.progress.alive()
            continue
        link.send(UserLine(worker=WORKER, text=repr(told)))
        if isinstance(told, StopRequested):
            break
    link.close()


def serve_refusing() -> None:
    def refuse(_: Delivery) -> None:
        raise RuntimeError("the runtime cannot take this")

    link = AgentLink(os.environ["ELASWAVE_AGENT_SOCK"], WORKER, refuse)
    link.open()
    threading.Event().wait()


if __name__ == "__main__":
    main()
