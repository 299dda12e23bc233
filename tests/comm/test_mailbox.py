"""Messages that are waiting for a receive."""

import gc
import weakref

import pytest
import torch

from elaswave.comm.communicator import Communicator
from elaswave.comm.mailbox import Mailbox
from elaswave.core.ids import WorkerId
from elaswave.errors import EpochChanged


def test_a_message_without_elements_is_received_as_any_dtype() -> None:
    def transmit(*_: object) -> None:
        raise AssertionError("nothing is sent")

    members = [WorkerId(0), WorkerId(1)]
    mailbox = Mailbox(Communicator("all", 1, me=members[0], members=members, transmit=transmit, agree_s=1.0))
    awaited = mailbox.expect(1, 0)
    empty = torch.empty(0, dtype=torch.uint8).as_strided((0,), (0,))  # as an empty payload comes out of a link
    mailbox.arrived(WorkerId(1), 0, 0, empty)
    assert mailbox.take(awaited, torch.empty(0, dtype=torch.complex64)) == 1


def test_what_has_come_before_an_edit_is_received_after_it() -> None:
    members = [WorkerId(worker) for worker in range(3)]
    communicator = Communicator("all", 1, me=members[0], members=members, transmit=lambda *_: None, agree_s=1.0)
    mailbox = Mailbox(communicator)
    first, second = mailbox.expect(1, 0), mailbox.expect(1, 0)
    mailbox.arrived(WorkerId(1), 0, 0, torch.ones(4, dtype=torch.uint8))
    communicator.edit(1, [WorkerId(1)], (), 0.0)
    mailbox.edited()
    assert mailbox.ready(first) and mailbox.ready(second)
    assert mailbox.take(first, torch.empty(1)) == 1
    with pytest.raises(EpochChanged):
        mailbox.take(second, torch.empty(1))


def test_receives_that_were_given_up_by_an_edit_are_forgotten() -> None:
    members = [WorkerId(worker) for worker in range(3)]
    communicator = Communicator("all", 1, me=members[0], members=members, transmit=lambda *_: None, agree_s=1.0)
    mailbox = Mailbox(communicator)
    abandoned = weakref.ref(mailbox.expect(1, 0))
    communicator.edit(1, [WorkerId(2)], (), 0.0)
    mailbox.edited()
    gc.collect()
    assert abandoned() is None
