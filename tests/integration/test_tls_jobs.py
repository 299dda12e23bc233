"""Jobs whose workers talk over TLS."""

import shutil
from pathlib import Path

import pytest
from covering import check_scenario
from harness import Ground
from scenario import Scenario

from elaswave.certificates import AUTHORITY_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE
from tests.comm.tls_authority import Authority

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command to make certificates with")


def test_a_job_over_tls_survives_a_loss(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Authority(tmp_path, "ours").issue("worker")
    monkeypatch.setenv(CERTIFICATE_VARIABLE, files.certificate)
    monkeypatch.setenv(KEY_VARIABLE, files.key)
    monkeypatch.setenv(AUTHORITY_VARIABLE, files.authority)
    check_scenario(ground, Scenario(layout="2x2", kind="kill", phase="backward", features=frozenset({"tcp"})))


def test_a_file_that_is_not_there_is_named(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CERTIFICATE_VARIABLE, KEY_VARIABLE, AUTHORITY_VARIABLE):
        monkeypatch.setenv(name, str(tmp_path / "missing.pem"))
    ended = ground.run(["--standalone", "--nproc-per-node=2", "--dp=2", "--link-transport=tcp"], [])
    assert ended.exit_code == 93
    assert "missing.pem" in ended.err
