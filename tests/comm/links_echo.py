"""A worker that sends back each frame as it came, to whom it came from. Ends with its standard input.

Arguments: own id, address to listen at, socket buffer in bytes. Writes the address it listens at; each line it reads,
"ID ADDRESS", is the address of a peer, and answered by "known".
"""

import sys
import threading
import time

from elaswave.comm.addresses import LinkOptions
from elaswave.comm.inbox import Inbox, LinkItem, Received
from elaswave.comm.links import Links
from elaswave.core.ids import WorkerId

STOP_KIND = 65535


def read_addresses(links: Links) -> None:
    for line in sys.stdin:
        peer, address = line.split()
        links.set_addresses({WorkerId(int(peer)): address})
        print("known", flush=True)


def main() -> None:
    inbox: Inbox[LinkItem] = Inbox()
    options = LinkOptions(socket_buffer_bytes=int(sys.argv[3]))
    links = Links(
        WorkerId(int(sys.argv[1])), b"the token of this job", inbox, payload_limit_bytes=64 << 20, options=options
    )
    print(links.listen(sys.argv[2]), flush=True)
    links.start()
    threading.Thread(target=read_addresses, args=(links,), daemon=True).start()
    while inbox.wait(time.monotonic() + 60.0):
        for item in inbox.take_all():
            if isinstance(item, Received):
                if item.kind == STOP_KIND:
                    links.close(5.0)
                    return
                links.send(item.peer, item.kind, item.meta, item.payload)


if __name__ == "__main__":
    main()
