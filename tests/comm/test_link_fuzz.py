"""Nonsense at a listener: whatever bytes come, it serves its peers, and reserves no memory for what was not sent."""

import random
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from numpy.typing import NDArray

from elaswave.comm import frames
from elaswave.comm.addresses import LinkOptions
from elaswave.comm.frames import encode_header
from elaswave.comm.hello import CHALLENGE_BYTES, encode_hello
from elaswave.comm.inbox import LinksFailed, PeerClosed, Received
from tests.comm.links_harness import End, RawDialler, meet, noise

PAYLOAD_LIMIT = 1 << 20
INTRUDER = 9
ROUNDS = 60

Attack = Callable[[random.Random, RawDialler], bytes]


def valid_frames(chance: random.Random) -> bytes:
    """A few frames as a peer would send them."""
    parts: list[bytes] = []
    for sequence in range(chance.randint(1, 4)):
        meta, payload = chance.randbytes(chance.choice((0, 5, 300))), chance.randbytes(chance.choice((0, 7, 40_000)))
        head = encode_header(kind=sequence, meta_bytes=len(meta), payload_bytes=len(payload), sequence=sequence)
        parts += [head, meta, payload]
    return b"".join(parts)


def mutated(chance: random.Random, stream: bytes) -> bytes:
    """With bytes changed, left out, put in, or cut off; mostly near the front, where the headers are."""
    changed = bytearray(stream)
    for _ in range(chance.randint(1, 5)):
        at = min(len(changed) - 1, int(chance.expovariate(1 / 30)))
        match chance.randrange(4):
            case 0:
                changed[at] = chance.randrange(256)
            case 1:
                del changed[at : at + chance.randint(1, 30)]
            case 2:
                changed[at:at] = chance.randbytes(chance.randint(1, 30))
            case _:
                changed[at : at + 8] = chance.choice((b"\xff" * 8, bytes(8)))
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def garbage(chance: random.Random, dialler: RawDialler) -> bytes:
    return chance.randbytes(chance.choice((1, 87, 88, 5000)))


def mutated_hello(chance: random.Random, dialler: RawDialler) -> bytes:
    return mutated(chance, encode_hello(dialler.challenged(INTRUDER, 1)) + valid_frames(chance))


def mutated_frames(chance: random.Random, dialler: RawDialler) -> bytes:
    dialler.join(INTRUDER, 1)
    return mutated(chance, valid_frames(chance))


def garbage_after_the_hello(chance: random.Random, dialler: RawDialler) -> bytes:
    dialler.join(INTRUDER, 1)
    return valid_frames(chance) + chance.randbytes(chance.choice((1, 24, 5000)))


@pytest.mark.parametrize("attack", [garbage, mutated_hello, mutated_frames, garbage_after_the_hello])
@pytest.mark.parametrize("checksums", [False, True])
def test_nonsense_disturbs_nobody(attack: Attack, checksums: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(f"{attack.__name__} {checksums}")
    largest = 0
    reserve = frames.aligned_buffer

    def watched(nbytes: int) -> NDArray[np.uint8]:
        nonlocal largest
        largest = max(largest, nbytes)
        return reserve(nbytes)

    monkeypatch.setattr(frames, "aligned_buffer", watched)
    options = LinkOptions(checksums=checksums)
    with (
        End(1, "tcp:127.0.0.1:0", payload_limit_bytes=PAYLOAD_LIMIT, options=options) as target,
        End(2, "tcp:127.0.0.1:0", payload_limit_bytes=PAYLOAD_LIMIT, options=options) as friend,
    ):
        meet(friend, target)
        for number in range(ROUNDS):
            with RawDialler(target.address) as dialler:
                stream = attack(chance, dialler)
                with suppress(ConnectionError):  # it hangs up as soon as it has seen enough
                    cuts = sorted(chance.randrange(len(stream) + 1) for _ in range(chance.randrange(4)))
                    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
                        dialler.socket.sendall(stream[start:end])
                payload = noise(1000, number)
                friend.links.send(target.me, 3, b"good", payload)
                found = target.next(Received, where=lambda item: item.peer == friend.me)
                assert found.meta == b"good" and bytes(found.payload) == payload.tobytes()
        with RawDialler(target.address) as dialler:
            assert len(dialler.read(CHALLENGE_BYTES)) == CHALLENGE_BYTES, "it accepts connections still"
        assert largest <= PAYLOAD_LIMIT
        assert target.nothing_of(LinksFailed)
        assert not [item for item in target.seen if isinstance(item, PeerClosed) and item.peer != INTRUDER]
        target.knows(friend).links.send(friend.me, 4, b"and answers")
        assert friend.next(Received, where=lambda item: item.kind == 4).meta == b"and answers"
