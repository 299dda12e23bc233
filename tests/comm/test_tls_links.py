"""Links over TLS: what is sent arrives, who has no certificate of the authority gets in nowhere, nothing hangs."""

import dataclasses
import random
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from links_harness import End, RawDialler, closed_reason, meet, noise
from tls_authority import Authority

from elaswave.certificates import TlsFiles, files_from_environment
from elaswave.comm.addresses import LinkOptions
from elaswave.comm.inbox import ConnectionRefused, Inbox, LinkItem, LinksFailed, PeerClosed, Received
from elaswave.comm.links import Links
from elaswave.core.ids import WorkerId
from elaswave.errors import ConfigError, LinkClosed, ProtocolError

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command to make certificates with")

TCP = "tcp:127.0.0.1:0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder, "ours")


@pytest.fixture(scope="module")
def files(authority: Authority) -> TlsFiles:
    return authority.issue("worker")


@pytest.mark.parametrize("buffer_bytes", [1 << 14, 1 << 20])
def test_frames_of_many_sizes_arrive_whole_and_in_order(files: TlsFiles, buffer_bytes: int) -> None:
    options = LinkOptions(tls=files, socket_buffer_bytes=buffer_bytes)
    sizes = [0, 1, 63, 4096, 16384, 16385, 32743, 32744, 32745, 100_000, 0, 1 << 20, 7, 8 << 20, 3, *[24] * 300]
    with End(0, TCP, options=options) as one, End(1, TCP, options=options) as other:
        meet(one, other)
        for number, size in enumerate(sizes):
            one.links.send(other.me, number, bytes([number % 256]) * (size % 5000), noise(size, number))
            other.links.send(one.me, number, b"back", noise(size, number))
        for number, size in enumerate(sizes):
            frame = other.next(Received)
            assert (frame.kind, frame.meta) == (number, bytes([number % 256]) * (size % 5000))
            assert np.array_equal(frame.payload, noise(size, number))
            assert np.array_equal(one.next(Received).payload, noise(size, number))


def test_a_listener_says_nothing_in_plain_text(files: TlsFiles) -> None:
    with End(1, TCP, options=LinkOptions(tls=files)) as end, RawDialler(end.address) as raw:
        raw.socket.settimeout(0.2)
        with suppress(TimeoutError):
            assert not raw.socket.recv(4), "no challenge in plain text"


def test_close_and_forget_are_orderly(files: TlsFiles) -> None:
    options = LinkOptions(tls=files)
    with End(0, TCP, options=options) as one, End(1, TCP, options=options) as other:
        meet(one, other)
        one.links.forget(other.me)
        assert closed_reason(other, 0).orderly
        meet(one, other)
        one.links.close(1.0)
        assert closed_reason(other, 0).orderly


def refused_both_ways(dialler: TlsFiles, listener: TlsFiles, at_dialler: str, at_listener: str) -> None:
    with (
        End(0, TCP, options=LinkOptions(tls=dialler)) as one,
        End(1, TCP, options=LinkOptions(tls=listener)) as other,
    ):
        one.knows(other).links.send(other.me, 1, b"secret", noise(1000))
        closed = closed_reason(one, 1)
        assert isinstance(closed.error, ProtocolError) and at_dialler in closed.reason
        refusal = other.next(ConnectionRefused)
        assert isinstance(refusal.error, ProtocolError) and at_listener in str(refusal.error)
        assert one.links.queued_bytes() == 0
        assert one.links.statistics().failed_dials == 1
        assert other.nothing_of(Received)


def test_a_dialler_of_another_authority_is_refused(folder: Path, authority: Authority, files: TlsFiles) -> None:
    foreign = Authority(folder, "foreign-dialler").issue("worker")
    trusting = dataclasses.replace(foreign, authority=authority.certificate)
    refused_both_ways(trusting, files, "refused our certificate: not signed", "not signed by our authority")


def test_a_listener_of_another_authority_is_refused(folder: Path, authority: Authority, files: TlsFiles) -> None:
    foreign = Authority(folder, "foreign-listener").issue("worker")
    trusting = dataclasses.replace(foreign, authority=authority.certificate)
    refused_both_ways(files, trusting, "not signed by our authority", "refused our certificate: not signed")


def test_expired_certificates_are_refused(authority: Authority, files: TlsFiles) -> None:
    expired = authority.issue("expired", days=-1)
    refused_both_ways(expired, files, "expired", "has expired")
    refused_both_ways(files, expired, "has expired", "expired")


def test_a_wrong_token_is_refused_inside_tls(files: TlsFiles) -> None:
    options = LinkOptions(tls=files)
    with End(0, TCP, token=b"guess", options=options) as one, End(1, TCP, options=options) as other:
        one.knows(other).links.send(other.me, 1, b"secret")
        assert "our job token is not its token" in closed_reason(one, 1).reason
        assert "not signed with this job's token" in str(other.next(ConnectionRefused).error)


def test_tls_meets_a_plain_listener(files: TlsFiles) -> None:
    with End(0, TCP, options=LinkOptions(tls=files)) as one, End(1, TCP) as other:
        one.knows(other).links.send(other.me, 1, b"secret")
        closed = closed_reason(one, 1)
        assert isinstance(closed.error, ProtocolError) and "speaks no TLS" in closed.reason
        assert "is a TLS handshake" in str(other.next(ConnectionRefused).error)


def test_a_plain_dialler_meets_tls(files: TlsFiles) -> None:
    with (
        End(0, TCP, options=LinkOptions(hello_limit_s=0.1)) as one,
        End(1, TCP, options=LinkOptions(hello_limit_s=0.1, tls=files)) as other,
    ):
        one.knows(other).links.send(other.me, 1, b"")
        closed = closed_reason(one, 1)
        assert isinstance(closed.error, LinkClosed)
        other.next(ConnectionRefused)


def test_garbage_disturbs_nobody(files: TlsFiles) -> None:
    chance = random.Random(7)
    options = LinkOptions(tls=files)
    with socket.create_server(("127.0.0.1", 0)) as trap, End(0, TCP, options=options) as caught:
        caught.links.set_addresses({WorkerId(9): f"tcp:127.0.0.1:{trap.getsockname()[1]}"})
        caught.links.send(WorkerId(9), 1, b"")
        dialled, _ = trap.accept()
        with dialled:
            first = dialled.recv(1 << 16)
    with End(1, TCP, options=options) as target, End(2, TCP, options=options) as friend:
        meet(friend, target)
        for number in range(60):
            stream = chance.randbytes(chance.choice((1, 5, 300, 5000)))
            if number % 3 == 1:
                stream = first[: chance.randrange(1, len(first))]
            elif number % 3 == 2:
                place = chance.randrange(len(first))
                stream = first[:place] + chance.randbytes(1) + first[place + 1 :] + chance.randbytes(50)
            with RawDialler(target.address) as dialler:
                with suppress(ConnectionError):
                    dialler.socket.sendall(stream)
                payload = noise(1000, number)
                friend.links.send(target.me, 3, b"good", payload)
                assert bytes(target.next(Received).payload) == payload.tobytes()
        assert target.nothing_of(LinksFailed) and target.nothing_of(PeerClosed)


@pytest.mark.parametrize("spoiled", ["certificate", "key", "authority"])
@pytest.mark.parametrize("how", ["missing", "nonsense"])
def test_files_that_will_not_do_are_named(files: TlsFiles, tmp_path: Path, spoiled: str, how: str) -> None:
    bad = tmp_path / spoiled
    if how == "nonsense":
        bad.write_text("nonsense")
    options = LinkOptions(tls=dataclasses.replace(files, **{spoiled: str(bad)}))
    inbox: Inbox[LinkItem] = Inbox()
    links = Links(WorkerId(0), b"token", inbox, payload_limit_bytes=1, options=options)
    with pytest.raises(ConfigError, match=str(bad)):
        links.listen(TCP)
    with pytest.raises(ConfigError, match=str(bad)):
        links.start()
    links.close(0.0)


def test_a_key_of_another_certificate_is_named(authority: Authority, files: TlsFiles) -> None:
    mixed = dataclasses.replace(files, key=authority.issue("other").key)
    links = Links(WorkerId(0), b"token", Inbox(), payload_limit_bytes=1, options=LinkOptions(tls=mixed))
    with pytest.raises(ConfigError, match="belong"):
        links.start()
    links.close(0.0)


def test_variables_are_all_set_or_none(files: TlsFiles) -> None:
    whole = {
        "ELASWAVE_TLS_CERTIFICATE": files.certificate,
        "ELASWAVE_TLS_KEY": files.key,
        "ELASWAVE_TLS_AUTHORITY": files.authority,
    }
    assert files_from_environment({}) is None
    assert files_from_environment(whole) == files
    with pytest.raises(ConfigError, match="ELASWAVE_TLS_KEY not set"):
        files_from_environment({name: value for name, value in whole.items() if "KEY" not in name})


def test_a_silent_connection_is_dropped_at_the_limit(files: TlsFiles) -> None:
    options = LinkOptions(hello_limit_s=0.05, tls=files)
    with End(1, TCP, options=options) as end, RawDialler(end.address) as raw:
        start = time.monotonic()
        assert raw.ended()
        assert time.monotonic() - start >= 0.04
        assert "no hello within 0.05 s" in str(end.next(ConnectionRefused).error)
