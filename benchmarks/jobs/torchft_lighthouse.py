"""TorchFT's lighthouse with its defaults, on loopback; writes its port to --out. Runs until it is stopped."""

import argparse
import os
import signal
from pathlib import Path

from torchft.coordination import LighthouseServer  # type: ignore[import-not-found,unused-ignore]

from elaswave.lifeline import end_with_parent


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True, help="end with this process")
    found = parser.parse_args()
    end_with_parent(found.parent)
    server = LighthouseServer(
        bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=60_000, quorum_tick_ms=100, heartbeat_timeout_ms=5000
    )
    port = server.address().rpartition(":")[2]
    temporary = found.out.with_suffix(f".{os.getpid()}")
    temporary.write_text(port)
    temporary.replace(found.out)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
