"""A worker that uses torch, for tests of the zygote: what it does is its first argument."""

import os
import re
import sys
import threading
from contextlib import suppress

import torch

from elaswave.core.events import UserLine
from elaswave.core.ids import WorkerId
from elaswave.runtime.agent_link import AgentLink


def open_link() -> tuple[AgentLink, WorkerId]:
    worker = WorkerId(int(os.environ["ELASWAVE_WORKER"]))
    link = AgentLink(os.environ["ELASWAVE_AGENT_SOCK"], worker, lambda _: None)
    link.open()
    return link, worker


def private_kib() -> int:
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_"))


def descriptors() -> list[str]:
    """What each open descriptor is, less numbers; marked where a child process would inherit it."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError, OSError):  # the descriptor of the listing itself
            target = os.readlink(f"/proc/self/fd/{number}")
            kind = re.search("memfd|socket|eventfd|eventpoll", target)
            inherited = int(number) > 2 and os.get_inheritable(int(number))
            found.append((kind.group() if kind else target.rpartition("/")[2]) + " (inherited)" * inherited)
    return sorted(found)


def main() -> None:
    link, worker = open_link()
    match sys.argv[1]:
        case "facts":
            gradient = torch.ones(3, requires_grad=True)
            (gradient * 2).sum().backward()
            lines = [
                str(torch.get_num_threads()),
                str(gradient.grad),
                os.environ.get("MARK", "none"),
                os.getcwd(),
                repr([name for name in ("grpc", "elaswave._pb.control_pb2_grpc") if name in sys.modules]),
                ",".join(descriptors()),
                str(os.getppid()),
                str(private_kib()),
            ]
            for line in lines:
                link.send(UserLine(worker=worker, text=line))
            link.close()
        case "nothing":
            link.close()
        case "wait":
            link.send(UserLine(worker=worker, text="here"))
            threading.Event().wait()
        case "raise":
            raise ValueError("in a fork")


if __name__ == "__main__":
    main()
