"""Messages that are waiting for a receive."""

import torch

from elaswave.comm.communicator import Communicator
from elaswave.comm.mailbox import Mailbox
from elaswave.core.ids import WorkerId


def test_a_message_without_elements_is_received_as_any_dtype() -> None:
    def transmit(*_: object) -> None:
        raise AssertionError("nothing is sent")

    members = [WorkerId(0), WorkerId(1)]
    mailbox = Mailbox(Communicator("all", 1, me=members[0], members=members, transmit=transmit, agree_s=1.0))
    awaited = mailbox.expect(1, 0)
    empty = torch.empty(0, dtype=torch.uint8).as_strided((0,), (0,))  # as an empty payload comes out of a link
    mailbox.arrived(WorkerId(1), 0, 0, empty)
    assert mailbox.take(awaited, torch.empty(0, dtype=torch.complex64)) == 1
