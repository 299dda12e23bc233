"""Memory of received payloads: nobody's bytes change while he refers to them, and memory is used again after that."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from elaswave.comm.receive_memory import POOLED_BYTES, ReceiveMemory

SIZES = (POOLED_BYTES, POOLED_BYTES + 1, POOLED_BYTES * 5 // 4, 3 * POOLED_BYTES)


def place(payload: NDArray[np.uint8]) -> int:
    return int(payload.ctypes.data)


def test_a_block_is_used_again_when_nobody_refers_to_it() -> None:
    memory = ReceiveMemory()
    first = memory.take(POOLED_BYTES)
    where = place(first)
    tensor = torch.from_numpy(first)[8:16].view(torch.float32)
    del first
    other = memory.take(POOLED_BYTES)
    assert place(other) != where, "a tensor still looks at it"
    del tensor
    assert place(memory.take(POOLED_BYTES)) == where


def test_no_more_than_the_limit_is_kept_and_the_unused_go_first() -> None:
    memory = ReceiveMemory(kept_bytes=4 * POOLED_BYTES)
    held = [memory.take(POOLED_BYTES) for _ in range(8)]
    places = {place(payload) for payload in held}
    assert len(places) == 8
    held.clear()
    again = [memory.take(POOLED_BYTES) for _ in range(3)]
    assert {place(payload) for payload in again} <= places
    del again
    large = memory.take(3 * POOLED_BYTES)
    where = place(large)
    del large
    assert place(memory.take(3 * POOLED_BYTES)) == where, "unused blocks have made room for it"


@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from(SIZES)), max_size=60))
def test_nothing_changes_under_who_refers_to_it(steps: list[tuple[int, int]]) -> None:
    """Eight users, each of whom lets go of what he has and takes anew."""
    memory = ReceiveMemory(kept_bytes=6 * POOLED_BYTES)
    held: dict[int, tuple[int, NDArray[np.uint8]]] = {}
    for number, (user, nbytes) in enumerate(steps):
        held.pop(user, None)
        taken = memory.take(nbytes)
        assert taken.size == nbytes and place(taken) % 64 == 0
        taken[:] = number % 256
        held[user] = (number % 256, taken)
        del taken
        assert all(bool((payload == mark).all()) for mark, payload in held.values())
