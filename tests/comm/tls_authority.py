"""Certificates made for a test by the openssl command."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from elaswave.certificates import TlsFiles


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


class Authority:
    """Signs certificates; all of its files are in one folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self.certificate, self._key = str(folder / f"{name}.pem"), str(folder / f"{name}.key")
        _openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}", "-keyout", self._key, "-out", self.certificate),
        )

    def issue(self, name: str, days: int = 2, hosts: Sequence[str] = ()) -> TlsFiles:
        """A machine's files, for these numeric addresses; of a negative number of days: expired."""
        stem = self._folder / f"{self._name}-{name}"
        request, key, certificate = (f"{stem}.{suffix}" for suffix in ("csr", "key", "pem"))
        _openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}"),
            *("-keyout", key, "-out", request),
        )
        names = self._folder / "names.cnf"
        names.write_text("subjectAltName=" + ",".join(f"IP:{host}" for host in hosts) if hosts else "", "ascii")
        _openssl(
            *(
                "x509",
                "-req",
                "-extfile",
                str(names),
                "-in",
                request,
                "-CA",
                self.certificate,
                "-CAkey",
                self._key,
                "-CAcreateserial",
            ),
            *("-days", str(days), "-out", certificate),
        )
        return TlsFiles(certificate=certificate, key=key, authority=self.certificate)
