"""Checksums of frames: damage closes the link with an error that says so, whatever bit it hits."""

import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elaswave.comm.addresses import LinkOptions
from elaswave.comm.frames import CHECKED, CHECKSUM, META_LIMIT_BYTES, FrameReader, checksum, encode_header
from elaswave.comm.inbox import Received
from elaswave.errors import PeerError, ProtocolError
from tests.comm.links_harness import End, RawDialler, closed_reason, meet, noise
from tests.comm.test_frames import Delivered, feed

LIMIT = 1 << 20
CHECKING = LinkOptions(checksums=True)


def checked_frame(kind: int, meta: bytes, payload: bytes, sequence: int = 0) -> bytes:
    meta_bytes = len(meta) + CHECKSUM.size
    head = encode_header(kind=kind, meta_bytes=meta_bytes, payload_bytes=len(payload), sequence=sequence, flags=CHECKED)
    return head + meta + CHECKSUM.pack(checksum(head, meta, zlib.crc32(payload))) + payload


@given(st.binary(max_size=60), st.binary(max_size=200), st.lists(st.integers(1, 50), min_size=1), st.data())
@settings(max_examples=150)
def test_a_flipped_bit_anywhere_is_noticed(meta: bytes, payload: bytes, chunks: list[int], data: st.DataObject) -> None:
    stream = bytearray(checked_frame(5, meta, payload))
    delivered = Delivered()
    feed(FrameReader(LIMIT, delivered, checksums=True), bytes(stream), chunks)
    assert delivered.frames == [(5, meta, payload)]
    bit = data.draw(st.integers(0, 8 * len(stream) - 1))
    stream[bit // 8] ^= 1 << bit % 8
    damaged = Delivered()
    reader = FrameReader(LIMIT, damaged, checksums=True)
    try:
        feed(reader, bytes(stream), chunks)
    except PeerError:
        pass
    else:
        assert reader.inside_frame, "a length grew: the rest is still awaited"
    assert damaged.frames == []


def test_the_longest_meta_has_room_for_its_checksum() -> None:
    delivered = Delivered()
    feed(FrameReader(LIMIT, delivered), checked_frame(1, bytes(META_LIMIT_BYTES), b""), [1 << 20])
    assert len(delivered.frames[0][1]) == META_LIMIT_BYTES


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
def test_checked_frames_arrive_and_damage_closes_the_link(tmp_path: Path, scheme: str) -> None:
    def place(name: str) -> str:
        return "tcp:127.0.0.1:0" if scheme == "tcp" else f"unix:{tmp_path / name}"

    with End(1, place("a"), options=CHECKING) as one, End(2, place("b"), options=CHECKING) as two:
        meet(one, two)
        for size in (0, 3, 5000, 3 << 20):
            payload = noise(size)
            one.links.send(two.me, 7, b"meta", payload)
            found = two.next(Received)
            assert (found.kind, found.meta) == (7, b"meta") and bytes(found.payload) == payload.tobytes()
        with RawDialler(two.address) as dialler:
            dialler.join(9, 2)
            damaged = bytearray(checked_frame(7, b"meta", bytes(5000)))
            damaged[-1] ^= 1
            dialler.socket.sendall(damaged)
            closed = closed_reason(two, 9)
            assert isinstance(closed.error, ProtocolError) and "damaged on its way" in closed.reason
            assert dialler.ended()
        one.links.send(two.me, 8, b"still here")
        assert two.next(Received).meta == b"still here"


def test_what_waits_is_what_was_checked(tmp_path: Path) -> None:
    """A payload changed by its owner while it waits would be taken for damage."""
    with (
        End(1, f"unix:{tmp_path / 'a'}", options=CHECKING) as one,
        End(2, f"unix:{tmp_path / 'b'}", options=CHECKING) as two,
    ):
        payload = noise(200_000)
        expected = payload.tobytes()
        one.knows(two).links.send(two.me, 1, b"", payload)  # nothing is connected yet: it waits
        payload[:] = 0
        assert bytes(two.next(Received).payload) == expected


def test_a_peer_without_checksums_is_refused_by_name_of_the_option(tmp_path: Path) -> None:
    with End(1, f"unix:{tmp_path / 'a'}") as one, End(2, f"unix:{tmp_path / 'b'}", options=CHECKING) as two:
        one.knows(two).links.send(two.me, 1, b"")
        assert "LinkOptions.checksums" in closed_reason(two, 1).reason
