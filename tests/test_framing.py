"""Frames: any split of the stream gives the same messages, and a length is checked before anything is kept."""

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave._pb import control_pb2
from elaswave.errors import ProtocolError
from elaswave.wire import FrameDecoder, encode_frame, parse


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [stream[start:stop] for start, stop in pairwise(edges)]


@given(st.lists(st.text(max_size=50), max_size=8), st.lists(st.integers(0, 10_000), max_size=20))
def test_any_split_gives_the_same_messages(texts: list[str], cuts: list[int]) -> None:
    messages = [control_pb2.UserLine(text=text) for text in texts]
    decoder = FrameDecoder(1000)
    bodies: list[bytes] = []
    for piece in pieces(b"".join(map(encode_frame, messages)), cuts):
        bodies += decoder.feed(piece)
    assert [parse(control_pb2.UserLine, body) for body in bodies] == messages
    assert decoder.pending_bytes == 0


def test_byte_by_byte() -> None:
    frame = encode_frame(control_pb2.UserLine(text="hello"))
    decoder = FrameDecoder(100)
    done = [decoder.feed(frame[index : index + 1]) for index in range(len(frame))]
    assert [len(found) for found in done] == [0] * (len(frame) - 1) + [1]


def test_incomplete_frame_is_seen_at_the_end() -> None:
    decoder = FrameDecoder(100)
    assert decoder.feed(encode_frame(control_pb2.UserLine(text="hello"))[:-1]) == []
    assert decoder.pending_bytes > 0


def test_length_at_the_limit_is_taken_and_one_more_is_not() -> None:
    assert FrameDecoder(3).feed(struct.pack(">I", 3) + b"abc") == [b"abc"]
    with pytest.raises(ProtocolError, match="4 bytes is announced, the limit is 3"):
        FrameDecoder(3).feed(struct.pack(">I", 4))


def test_header_alone_is_enough_to_refuse_and_the_decoder_stays_closed() -> None:
    decoder = FrameDecoder(1 << 20)
    with pytest.raises(ProtocolError, match="4294967295"):
        decoder.feed(b"\xff\xff\xff\xff")
    for data in (b"", encode_frame(control_pb2.UserLine(text="fine"))):
        with pytest.raises(ProtocolError, match="4294967295"):
            decoder.feed(data)
    assert decoder.pending_bytes == 4


def test_long_messages_are_not_sent() -> None:
    with pytest.raises(ProtocolError, match="UserLine of 103 bytes exceeds the limit of 100"):
        encode_frame(control_pb2.UserLine(text="x" * 101), limit_bytes=100)


@given(st.lists(st.binary(max_size=40), max_size=10))
def test_random_bytes_raise_nothing_else(chunks: list[bytes]) -> None:
    decoder = FrameDecoder(64)
    try:
        bodies = [body for chunk in chunks for body in decoder.feed(chunk)]
    except ProtocolError:
        return
    assert all(len(body) <= 64 for body in bodies)
    assert sum(len(body) + 4 for body in bodies) + decoder.pending_bytes == sum(map(len, chunks))
