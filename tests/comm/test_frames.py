"""Framing: any split of the stream gives the same frames; what no sender may send is refused before it costs memory."""

import contextlib
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from elaswave.comm import frames
from elaswave.comm.frames import GOODBYE, HEADER, MAGIC, STAGING_BYTES, FrameReader, encode_goodbye, encode_header
from elaswave.errors import PeerError, ProtocolError

Frame = tuple[int, bytes, bytes]
LIMIT = 4 * STAGING_BYTES


class Delivered:
    """Collects frames, and checks what holds for each payload."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def __call__(self, kind: int, meta: bytes, payload: NDArray[np.uint8]) -> None:
        assert payload.dtype == np.uint8
        assert payload.flags.writeable
        assert not payload.size or payload.ctypes.data % 64 == 0
        self.frames.append((kind, meta, payload.tobytes()))


def stream_of(sent: list[Frame]) -> bytes:
    parts = []
    for sequence, (kind, meta, payload) in enumerate(sent):
        head = encode_header(kind=kind, meta_bytes=len(meta), payload_bytes=len(payload), sequence=sequence)
        parts += [head, meta, payload]
    return b"".join(parts)


def feed(reader: FrameReader, data: bytes, chunks: list[int]) -> None:
    """As a socket would: at most a chunk a call, and never more than the reader has room for."""
    least = len(data) // 300  # else a large stream in chunks of 1 byte takes seconds
    at, turn = 0, 0
    while at < len(data):
        buffer = reader.buffer()
        assert len(buffer) > 0
        chunk = data[at : at + min(len(buffer), max(least, chunks[turn % len(chunks)]))]
        buffer[: len(chunk)] = chunk
        reader.advance(len(chunk))
        at += len(chunk)
        turn += 1


SIZES = st.one_of(
    st.integers(0, 40), st.sampled_from([4095, STAGING_BYTES - 24, STAGING_BYTES, STAGING_BYTES + 1, LIMIT])
)


@st.composite
def some_frames(draw: st.DrawFn) -> list[Frame]:
    block = np.random.default_rng(draw(st.integers(0, 99))).bytes(LIMIT)
    shapes = draw(st.lists(st.tuples(st.integers(0, 65535), SIZES, SIZES), max_size=8))
    return [(kind, block[:meta], block[-payload:] if payload else b"") for kind, meta, payload in shapes]


CHUNKS = st.lists(st.one_of(st.integers(1, 60), st.sampled_from([4096, 30000, 1 << 20])), min_size=1, max_size=12)


@given(sent=some_frames(), chunks=CHUNKS)
def test_any_split_gives_the_frames_that_were_sent(sent: list[Frame], chunks: list[int]) -> None:
    delivered = Delivered()
    reader = FrameReader(LIMIT, delivered)
    feed(reader, stream_of(sent), chunks)
    assert delivered.frames == sent
    assert not reader.inside_frame


@given(sent=some_frames(), chunks=CHUNKS, cut=st.integers(1, 1 << 20))
def test_a_cut_stream_gives_the_whole_frames_before_the_cut(sent: list[Frame], chunks: list[int], cut: int) -> None:
    stream = stream_of(sent)
    delivered = Delivered()
    reader = FrameReader(LIMIT, delivered)
    at = cut % (len(stream) + 1)
    feed(reader, stream[:at], chunks)
    whole = 0
    while len(stream_of(sent[: whole + 1])) <= at and whole < len(sent):
        whole += 1
    assert delivered.frames == sent[:whole]
    assert reader.inside_frame == (at > len(stream_of(sent[:whole])))


@given(data=st.binary(max_size=400), chunks=CHUNKS)
def test_garbage_is_refused_and_nothing_else_happens(data: bytes, chunks: list[int]) -> None:
    delivered = Delivered()
    with contextlib.suppress(ProtocolError):
        feed(FrameReader(LIMIT, delivered), data, chunks)
    assert delivered.frames == []


@given(sent=some_frames(), chunks=CHUNKS, at=st.integers(0, 23), value=st.integers(0, 255), which=st.integers(0, 7))
def test_a_changed_header_byte_never_does_more_than_end_the_stream(
    sent: list[Frame], chunks: list[int], at: int, value: int, which: int
) -> None:
    if not sent:
        return
    which %= len(sent)
    stream = bytearray(stream_of(sent))
    stream[len(stream_of(sent[:which])) + at] = value
    delivered = Delivered()
    try:
        feed(FrameReader(LIMIT, delivered), bytes(stream), chunks)
    except PeerError as error:
        assert isinstance(error, ProtocolError)
    assert delivered.frames[:which] == sent[:which]


HEAD = {"magic": MAGIC, "kind": 3, "flags": 0, "meta_bytes": 0, "sequence": 1, "payload_bytes": 0}
GIB = 1 << 30


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"magic": 0x12345678}, ["0x12345678"]),
        ({"sequence": 0}, ["sequence 0", "1 was due"]),
        ({"sequence": 2}, ["sequence 2", "1 was due"]),
        ({"flags": 2}, ["flags 0x0002"]),
        ({"flags": GOODBYE | 8}, ["flags 0x0009"]),
        ({"meta_bytes": (1 << 20) + 1}, ["1048577", "1048576"]),
        ({"meta_bytes": (1 << 32) - 1}, ["4294967295", "1048576"]),
        ({"payload_bytes": LIMIT + 1}, [str(LIMIT + 1), str(LIMIT), "payload_limit_bytes"]),
        ({"payload_bytes": (1 << 64) - 1}, [str((1 << 64) - 1)]),
        ({"flags": GOODBYE, "meta_bytes": 1}, ["good-bye", "1 bytes of meta"]),
        ({"flags": GOODBYE, "payload_bytes": 7}, ["good-bye", "7 of payload"]),
    ],
)
def test_what_may_not_be_sent_is_named_and_allocates_nothing(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, int], words: list[str]
) -> None:
    delivered = Delivered()
    reader = FrameReader(LIMIT, delivered)
    feed(reader, stream_of([(1, b"before", b"good")]), [1000])
    allocated: list[int] = []
    monkeypatch.setattr(frames, "aligned_buffer", allocated.append)
    room = len(reader.buffer())
    with pytest.raises(ProtocolError) as refusal:
        feed(reader, HEADER.pack(*(HEAD | change).values()), [1000])
    assert all(word in str(refusal.value) for word in words)
    assert allocated == []
    assert len(reader.buffer()) <= room
    assert delivered.frames == [(1, b"before", b"good")]


def test_frames_before_a_malformed_one_in_the_same_chunk_are_delivered() -> None:
    sent = [(kind, b"meta", bytes(kind)) for kind in range(5)]
    delivered = Delivered()
    with pytest.raises(ProtocolError):
        feed(FrameReader(LIMIT, delivered), stream_of(sent) + b"x" * 24, [1 << 20])
    assert delivered.frames == sent


def test_good_bye_is_the_end() -> None:
    delivered = Delivered()
    reader = FrameReader(LIMIT, delivered)
    feed(reader, stream_of([(1, b"", b"")]) + encode_goodbye(1), [1000])
    assert reader.goodbye
    assert not reader.inside_frame
    assert delivered.frames == [(1, b"", b"")]
    with pytest.raises(ProtocolError, match="after the good-bye"):
        feed(reader, encode_header(kind=1, meta_bytes=0, payload_bytes=0, sequence=2), [1000])


def test_the_sequence_wraps() -> None:
    delivered = Delivered()
    reader = FrameReader(LIMIT, delivered)
    reader._sequence = 2**32 - 1
    for sequence in (2**32 - 1, 2**32, 2**32 + 1):
        feed(reader, encode_header(kind=1, meta_bytes=0, payload_bytes=0, sequence=sequence), [1000])
    assert len(delivered.frames) == 3


def test_a_large_payload_is_received_in_place() -> None:
    delivered: list[NDArray[np.uint8]] = []
    reader = FrameReader(LIMIT, lambda kind, meta, payload: delivered.append(payload))
    payload = os.urandom(LIMIT)
    head = encode_header(kind=1, meta_bytes=0, payload_bytes=LIMIT, sequence=0)
    feed(reader, head + payload[:100], [1 << 20])
    target = reader.buffer()
    assert len(target) == LIMIT - 100
    feed(reader, payload[100:], [1 << 20])
    assert np.shares_memory(np.frombuffer(target, dtype=np.uint8), delivered[0])
    assert delivered[0].tobytes() == payload


def test_no_memory_for_a_payload_closes_the_link_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(nbytes: int) -> NDArray[np.uint8]:
        raise MemoryError

    monkeypatch.setattr(frames, "aligned_buffer", fail)
    with pytest.raises(PeerError, match="no memory for a payload of 100 bytes"):
        feed(FrameReader(LIMIT, Delivered()), stream_of([(1, b"", bytes(100))]), [1000])
