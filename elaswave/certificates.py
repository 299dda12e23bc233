"""Certificates for what goes between machines: who may talk at all. Links and the control plane use the same files."""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from elaswave.errors import ConfigError

if TYPE_CHECKING:
    import ssl

CERTIFICATE_VARIABLE = "ELASWAVE_TLS_CERTIFICATE"
KEY_VARIABLE = "ELASWAVE_TLS_KEY"
AUTHORITY_VARIABLE = "ELASWAVE_TLS_AUTHORITY"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files of one machine: its certificate (chain), the key of that, not encrypted, and who signs for all."""

    certificate: str
    key: str
    authority: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pem:
    """What TlsFiles hold."""

    certificate: bytes
    key: bytes
    authority: bytes


def files_from_environment(environment: Mapping[str, str]) -> TlsFiles | None:
    """The files that the ELASWAVE_TLS_* variables name; None where none is set. ConfigError where only some are."""
    names = (CERTIFICATE_VARIABLE, KEY_VARIABLE, AUTHORITY_VARIABLE)
    missing = [name for name in names if not environment.get(name)]
    if len(missing) == len(names):
        return None
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not set: set all of {', '.join(names)}, or none")
    certificate, key, authority = (environment[name] for name in names)
    return TlsFiles(certificate=certificate, key=key, authority=authority)


def needed_files(environment: Mapping[str, str]) -> TlsFiles:
    """The same where there have to be some. Raises ConfigError."""
    found = files_from_environment(environment)
    if found is None:
        raise ConfigError(f"TLS is asked for: set {CERTIFICATE_VARIABLE}, {KEY_VARIABLE} and {AUTHORITY_VARIABLE}")
    return found


def read_pem(files: TlsFiles) -> Pem:
    """What the files hold, once it is known to load. Raises ConfigError that names the one that will not do."""
    make_context(files, listens=False)
    certificate, key, authority = (_read(path) for path in (files.certificate, files.key, files.authority))
    return Pem(certificate=certificate, key=key, authority=authority)


def make_context(files: TlsFiles, *, listens: bool) -> "ssl.SSLContext":
    """TLS 1.3 with certificates of both sides, whatever the names in them. Raises ConfigError as `read_pem`."""
    import ssl  # noqa: PLC0415 - takes 10 ms, of which a launch without TLS needs nothing

    for path in (files.certificate, files.key, files.authority):
        _read(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if listens else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cafile=files.authority)
    except ssl.SSLError as error:
        raise ConfigError(f"TLS authority {files.authority!r} holds no certificate as PEM: {error.reason}") from error
    try:
        # A password is never asked for at a terminal: an encrypted key fails.
        context.load_cert_chain(files.certificate, files.key, password=b"")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"TLS certificate {files.certificate!r} and key {files.key!r} do not load as PEM, or do not belong "
            f"together: {error}; keys must not be encrypted"
        ) from error
    return context


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine reach an address, by its look: names but "localhost" are not resolved."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS file {path!r} cannot be read: {error.strerror}") from error
