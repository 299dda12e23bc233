"""One of two ranks that add up again and again by TCP, till their link is cut: rank, host, seconds of both limits."""

import sys
import time

import torch

from elaswave.comm.addresses import LinkOptions
from elaswave.comm.endpoint import Endpoint
from elaswave.comm.endpoint_options import EndpointOptions
from elaswave.comm.group import Group
from elaswave.comm.inbox import PeerClosed
from elaswave.core.ids import WorkerId
from elaswave.errors import ElasWaveError

ELEMENTS = 1 << 20


def lost(closed: PeerClosed) -> None:
    """End what is under way."""
    raise closed.error


def say(text: str) -> None:
    """To the test."""
    print(text, flush=True)


def main() -> None:
    """Say the address, read the peer's, and say what the first failure is, after the first sum was right."""
    rank, host, user_timeout_s, limit_s = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
    # Who waits and has nothing on its way learns of a cut by its own questions only.
    tuned = LinkOptions(user_timeout_s=user_timeout_s, keepalive_idle_s=1, keepalive_interval_s=1)
    options = EndpointOptions(links=tuned)
    endpoint = Endpoint(WorkerId(rank), b"token", on_lost=lost, on_notice=lambda peer, content: None, options=options)
    say(endpoint.open(f"tcp:{host}:0"))
    endpoint.connect({WorkerId(1 - rank): sys.stdin.readline().strip()})
    group = Group(endpoint, endpoint.communicator("all", [WorkerId(0), WorkerId(1)]), limit_s)
    begun = time.monotonic()
    try:
        while True:
            tensor = torch.ones(ELEMENTS)
            begun = time.monotonic()
            endpoint.wait(group.all_reduce(tensor))
            assert bool((tensor == 2).all())
            say("added")
    except ElasWaveError as error:
        say(f"{type(error).__name__} after {time.monotonic() - begun:.1f} s: {error}")
    endpoint.close(0.0)


if __name__ == "__main__":
    main()
