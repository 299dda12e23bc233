"""The process group "elastic" over TLS: sums are right before and after a rank is killed."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from nursery_client import LINKS, Nursery
from tls_authority import Authority


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command to make certificates with")
def test_sums_go_on_over_tls_after_a_loss(tmp_path: Path) -> None:
    files = Authority(tmp_path, "ours").issue("worker")
    variables = {
        "ELASWAVE_TLS_CERTIFICATE": files.certificate,
        "ELASWAVE_TLS_KEY": files.key,
        "ELASWAVE_TLS_AUTHORITY": files.authority,
    }
    with TemporaryDirectory(prefix="pg-") as temporary:
        nursery = Nursery(temporary)
        try:
            found = nursery.run("sums_over_tls", 3, tmp_path, killed=(2,), memory=LINKS, variables=variables)
        finally:
            nursery.close()
    # The last sum with the killed rank counts for both that are left, or for neither.
    assert found in ({rank: [sums, True] for rank in (0, 1)} for sums in ([6.0, 3.0], [3.0]))
