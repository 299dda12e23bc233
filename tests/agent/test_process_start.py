"""Messages between agent and zygote."""

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave.core.ids import WorkerId
from elaswave.errors import ProtocolError
from elaswave.handshake import HELLO_BYTES, Role, decode_hello, encode_hello
from elaswave.process_start import (
    MAX_MESSAGE_BYTES,
    Message,
    MessageDecoder,
    Program,
    Started,
    StartRefused,
    StartRequest,
    Unavailable,
    WorkerEnded,
    encode,
)

WORKERS = st.integers(0, 2**31 - 1).map(WorkerId)
# Arguments of processes may hold any bytes but 0.
TEXTS = st.binary(max_size=20).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
PROGRAMS = st.builds(Program, target=TEXTS, arguments=st.lists(TEXTS, max_size=3).map(tuple), is_module=st.booleans())
REQUESTS = st.builds(
    StartRequest,
    worker=WORKERS,
    program=PROGRAMS,
    environment=st.lists(st.tuples(TEXTS, TEXTS), max_size=3).map(tuple),
    working_directory=TEXTS,
    stdout=TEXTS,
    stderr=TEXTS,
)
MESSAGES = st.one_of(
    REQUESTS,
    st.builds(Started, worker=WORKERS, pid=st.integers(1, 2**22)),
    st.builds(StartRefused, worker=WORKERS, reason=TEXTS),
    st.builds(WorkerEnded, worker=WORKERS, exit_code=st.integers(0, 255), signal=st.integers(0, 64)),
    st.builds(Unavailable, reason=TEXTS),
)


@given(st.lists(MESSAGES, max_size=5), st.data())
def test_messages_survive_any_cutting_of_the_stream(messages: list[Message], data: st.DataObject) -> None:
    stream = b"".join(map(encode, messages))
    decoder = MessageDecoder()
    found: list[Message] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += decoder.feed(stream[:size])
        stream = stream[size:]
    assert found == messages


@given(MESSAGES, st.data())
def test_damaged_messages_are_refused_or_are_other_messages(message: Message, data: st.DataObject) -> None:
    """Whatever a byte is turned into: a message, a wait for more, or ProtocolError; never another error."""
    raw = bytearray(encode(message))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(ProtocolError):
        MessageDecoder().feed(bytes(raw))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (struct.pack("<I", 0), "0 bytes"),
        (struct.pack("<I", MAX_MESSAGE_BYTES + 1), str(MAX_MESSAGE_BYTES + 1)),
        (struct.pack("<IB", 1, 9), "unknown kind 9"),
        (struct.pack("<IBi", 5, 2, 1), "too early"),
        (struct.pack("<IBiii", 13, 2, 1, 1, 1), "after its last field"),
        (struct.pack("<IBiI", 9, 3, 1, 2**32 - 1), "too early"),
    ],
)
def test_what_is_no_message_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        MessageDecoder().feed(raw)


def test_too_long_messages_are_refused_by_their_sender() -> None:
    with pytest.raises(ProtocolError, match="shorten"):
        encode(Unavailable(reason="x" * MAX_MESSAGE_BYTES))


@given(st.sampled_from(Role), WORKERS)
def test_hello_survives(role: Role, worker: WorkerId) -> None:
    raw = encode_hello(role, worker)
    assert len(raw) == HELLO_BYTES
    assert decode_hello(raw) == (role, worker)


@pytest.mark.parametrize("raw", [b"GET / HTT", b"EWA1\x07\0\0\0\0"])
def test_what_is_no_hello_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError, match="same ElasWave"):
        decode_hello(raw)
