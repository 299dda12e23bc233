"""The hello: only who holds the token gets in, only the worker that was meant answers, nothing can be replayed."""

import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave.comm import hello
from elaswave.comm.hello import Ends, HelloRefused
from elaswave.core.ids import WorkerId

ME, PEER = WorkerId(3), WorkerId(2**64 - 1)


def ends() -> Ends:
    return Ends(token=b"secret", sender=PEER, receiver=ME, listener_nonce=os.urandom(32), dialler_nonce=os.urandom(32))


def heard(data: bytes, right: Ends, token: bytes = b"secret", me: WorkerId = ME) -> Ends:
    return hello.read_hello(data, token=token, me=me, listener_nonce=right.listener_nonce)


def test_both_ends_are_proven() -> None:
    right = ends()
    assert hello.read_challenge(hello.encode_challenge(right.listener_nonce)) == right.listener_nonce
    assert heard(hello.encode_hello(right), right) == right
    hello.check_welcome(hello.encode_welcome(right), right)
    assert len(hello.encode_challenge(right.listener_nonce)) == hello.CHALLENGE_BYTES
    assert len(hello.encode_hello(right)) == hello.HELLO_BYTES
    assert len(hello.encode_welcome(right)) == hello.WELCOME_BYTES


def test_a_wrong_token_is_refused_and_told() -> None:
    wrong = replace(ends(), token=b"other")
    with pytest.raises(HelloRefused, match=f"worker {PEER} is not signed with this job's token") as refusal:
        heard(hello.encode_hello(wrong), wrong)
    with pytest.raises(HelloRefused, match=f"worker {ME} refused our hello: our job token is not its token"):
        hello.check_welcome(refusal.value.answer, wrong)


def test_another_receiver_is_refused_and_told() -> None:
    right = ends()
    with pytest.raises(HelloRefused, match=f"dialled worker {ME} at the address of worker 4") as refusal:
        heard(hello.encode_hello(right), right, me=WorkerId(4))
    with pytest.raises(HelloRefused, match="it is another worker"):
        hello.check_welcome(refusal.value.answer, right)


def test_a_replayed_hello_is_refused() -> None:
    recorded = ends()
    with pytest.raises(HelloRefused):
        heard(hello.encode_hello(recorded), ends())


def test_a_listener_without_the_token_is_found_out() -> None:
    right = ends()
    with pytest.raises(HelloRefused, match="does not hold this job's token"):
        hello.check_welcome(hello.encode_welcome(replace(right, token=b"guess")), right)


def test_a_reflected_proof_is_not_taken() -> None:
    right = ends()
    sender_proof = hello.encode_hello(right)[-32:]
    with pytest.raises(HelloRefused, match="does not hold"):
        hello.check_welcome(hello.encode_welcome(right)[:-32] + sender_proof, right)


def test_another_version_is_named() -> None:
    right = ends()
    data = bytearray(hello.encode_hello(right))
    data[4] = 9
    with pytest.raises(HelloRefused, match="version 9; this side speaks 1"):
        heard(bytes(data), right)


@given(at=st.integers(0, hello.HELLO_BYTES - 1), value=st.integers(1, 255))
def test_any_changed_byte_is_refused(at: int, value: int) -> None:
    right = ends()
    data = bytearray(hello.encode_hello(right))
    data[at] ^= value
    if at in (6, 7):  # reserved: neither read nor signed
        assert heard(bytes(data), right) == right
        return
    with pytest.raises(HelloRefused):
        heard(bytes(data), right)


@given(data=st.binary(min_size=hello.HELLO_BYTES, max_size=hello.HELLO_BYTES))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(HelloRefused):
        heard(data, ends())
