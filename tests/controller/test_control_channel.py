"""The control plane over TLS: who shows a certificate of the authority gets in, nobody else does, and nobody hangs."""

import shutil
from pathlib import Path

import grpc
import pytest
from controller_harness import LIMIT_S, TOKEN, controller, metadata, run
from grpc import aio

from elaswave._pb import control_pb2 as pb
from elaswave._pb.control_pb2_grpc import OperatorServiceStub
from elaswave.certificates import TlsFiles
from elaswave.core.status import JobStatus
from elaswave.errors import ConfigError, PeerError
from elaswave_launch.wire import Operator
from tests.comm.tls_authority import Authority

HERE = "127.0.0.1"

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command to make certificates with")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


def ask(served: TlsFiles, asks: TlsFiles | None) -> JobStatus:
    """The status of a controller with some files, asked for with others."""

    async def body() -> JobStatus:
        async with controller(tls=served) as running:
            operator = Operator(running.address, TOKEN, asks)
            try:
                return await operator.status()
            finally:
                await operator.close()

    return run(body())


def test_both_sides_show_certificates_of_the_authority(authority: Authority) -> None:
    assert ask(authority.issue("node0", hosts=[HERE]), authority.issue("operator")).job == "job"


def test_plain_text_does_not_get_in(authority: Authority) -> None:
    with pytest.raises(PeerError, match="controller at"):
        ask(authority.issue("node0", hosts=[HERE]), None)


def test_another_authority_is_named_on_the_asking_side(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "theirs").issue("operator")
    with pytest.raises(PeerError, match="CERTIFICATE_VERIFY_FAILED"):
        ask(authority.issue("node0", hosts=[HERE]), stranger)


def test_a_controller_with_a_certificate_for_another_host_is_not_believed(authority: Authority) -> None:
    with pytest.raises(PeerError, match="Hostname Verification Check failed"):
        ask(authority.issue("node0", hosts=["127.0.0.2"]), authority.issue("operator"))


def test_who_shows_no_certificate_does_not_get_in(authority: Authority) -> None:
    files = authority.issue("node0", hosts=[HERE])

    async def body() -> None:
        credentials = grpc.ssl_channel_credentials(Path(files.authority).read_bytes())
        async with controller(tls=files) as running, aio.secure_channel(running.address, credentials) as channel:
            await OperatorServiceStub(channel).Status(pb.StatusRequest(), metadata=metadata(), timeout=LIMIT_S)

    with pytest.raises(aio.AioRpcError) as raised:
        run(body())
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def test_files_that_do_not_belong_together_are_named(authority: Authority) -> None:
    one, other = authority.issue("one"), authority.issue("other")
    mixed = TlsFiles(certificate=one.certificate, key=other.key, authority=one.authority)
    with pytest.raises(ConfigError, match="do not belong together"):
        ask(mixed, None)
